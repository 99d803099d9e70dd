"""Samples of one file as a sequence that is read one at a time: what packing needs to know of a data set.

A source knows where each sample ends in the concatenation of all (`ends`) and reads one when asked. It holds 16 bytes
a sample, as much as a row of the meta; the tokens stay on disk. Which files there are is `catalog`'s, the bytes are
`binmeta`'s, what becomes of the samples `packing`'s.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from internlm_ds.data.binmeta import IntArray, decode_line
from internlm_ds.errors import DataFormatError

_HEAD, _TAIL = b'{"tokens": [', b"]}"
_DIGITS = b"0123456789, -"


class Samples(Protocol):
    """Samples in a fixed order, each an int64 array of tokens signed as on disk.

    Attributes:
        ends: int64 `(n,)`; tokens of all samples up to and including each, so sample i has `ends[i] - ends[i-1]`.
        type_id: Data type of every token.
    """

    @property
    def ends(self) -> IntArray: ...

    @property
    def type_id(self) -> int: ...

    def __len__(self) -> int: ...

    def take(self, order: IntArray) -> Samples:
        """The samples named, in that order; the tokens are not touched."""
        ...

    def read(self, index: int) -> IntArray:
        """Tokens of one sample, `(length,)` int64, signed as on disk."""
        ...


def lengths_of(ends: IntArray) -> IntArray:
    """Lengths of samples from where they end.

    >>> lengths_of(np.array([3, 3, 7])).tolist()
    [3, 0, 4]
    """
    return np.diff(ends, prepend=0)


class ListedSamples:
    """Samples held in memory, for tests and small things."""

    def __init__(self, tokens: Sequence[Sequence[int] | IntArray], *, type_id: int = 0):
        self.tokens = [np.asarray(sample, dtype=np.int64) for sample in tokens]
        self.type_id = type_id
        self.ends: IntArray = np.cumsum([len(sample) for sample in self.tokens], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, order: IntArray) -> ListedSamples:
        return ListedSamples([self.tokens[index] for index in order], type_id=self.type_id)

    def read(self, index: int) -> IntArray:
        return self.tokens[index]


class Mappings:
    """Files mapped into memory, the oldest given up when there are too many (a mapping holds a file handle).

    Needs no lock: a file mapped twice by two threads does no harm. A copy in another process starts empty.
    """

    def __init__(self, limit: int = 256):
        self.limit = limit
        self._open: dict[str, mmap.mmap] = {}

    def get(self, path: str) -> mmap.mmap:
        found = self._open.get(path)
        if found is None:
            found = _map(path)
            while len(self._open) >= self.limit:
                # not closed here: another thread may be reading it; it closes with its last user
                self._open.pop(next(iter(self._open)), None)
            self._open[path] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_open": {}}


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        message = f"the file was there at the start and cannot be read any more ({error}); put it back and resume"
        raise DataFormatError(message, path=path) from None


class FileSamples:
    """Samples of one bin file.

    Args:
        path: The bin.
        offsets: int64 `(n,)`, byte offset of each sample's line.
        ends: int64 `(n,)`, see `Samples`.
        type_id: Data type of the file.
        vocab_size: Ids must be below it; None leaves them unchecked.
        mappings: Shared by the files of a data set.
    """

    def __init__(
        self,
        path: str,
        *,
        offsets: IntArray,
        ends: IntArray,
        type_id: int = 0,
        vocab_size: int | None = None,
        mappings: Mappings | None = None,
    ):
        self.path, self.offsets, self.ends = path, offsets, ends
        self.type_id, self.vocab_size = type_id, vocab_size
        self.mappings = mappings or Mappings()

    def __len__(self) -> int:
        return len(self.offsets)

    def take(self, order: IntArray) -> FileSamples:
        return FileSamples(
            self.path,
            offsets=self.offsets[order],
            ends=np.cumsum(lengths_of(self.ends)[order], dtype=np.int64),
            type_id=self.type_id,
            vocab_size=self.vocab_size,
            mappings=self.mappings,
        )

    def read(self, index: int) -> IntArray:
        """Tokens of one sample.

        Raises:
            DataFormatError: The line is damaged, is not the one the meta describes, or has an id beyond the vocabulary.
        """
        offset = int(self.offsets[index])
        length = int(self.ends[index] - (self.ends[index - 1] if index else 0))
        text = self._line_at(offset)
        tokens = parse_line(text, length)
        if tokens is None:
            tokens = decode_line(text, path=self.path, line=self.line_number(offset), offset_bytes=offset)
        if len(tokens) != length:
            raise self._misfit(offset, f"{len(tokens)} tokens where the meta says {length}")
        if self.vocab_size is not None and length and max(tokens.max(), -tokens.min()) >= self.vocab_size:
            raise self._beyond_vocabulary(tokens, offset)
        return tokens

    def line_number(self, offset: int) -> int:
        """1-based line of a byte of the bin, counted from its start: for error messages only."""
        mapping, block = self.mappings.get(self.path), 1 << 20
        return 1 + sum(mapping[at : min(at + block, offset)].count(b"\n") for at in range(0, offset, block))

    def _line_at(self, offset: int) -> bytes:
        mapping = self.mappings.get(self.path)
        if offset and mapping[offset - 1 : offset] != b"\n":
            raise self._misfit(offset, "no line starts here")
        end = mapping.find(b"\n", offset)
        return mapping[offset : end + 1 if end >= 0 else len(mapping)]

    def _misfit(self, offset: int, what: str) -> DataFormatError:
        message = f"{what}: the meta does not fit this bin (changed since the start, or written by two tools?)"
        message += "; tokenize the text again (internlm-ds preprocess … --overwrite)"
        return DataFormatError(message, path=self.path, line=self.line_number(offset), offset_bytes=offset)

    def _beyond_vocabulary(self, tokens: IntArray, offset: int) -> DataFormatError:
        worst = int(np.abs(tokens).max())
        message = f"token id {worst} does not fit model.vocab_size = {self.vocab_size}; set model.vocab_size to that of"
        message += " the tokenizer that made this file, or tokenize the text again with the model's tokenizer"
        return DataFormatError(message, path=self.path, line=self.line_number(offset), offset_bytes=offset)


def parse_line(text: bytes, length: int) -> IntArray | None:
    """The usual line of a bin, four times as fast as JSON; None where it is not the usual line of `length` tokens.

    >>> parse_line(b'{"tokens": [1, -2, 3]}\\n', 3).tolist()
    [1, -2, 3]
    >>> parse_line(b'{"tokens": [1, 2.5]}\\n', 2) is None
    True
    """
    body = text[len(_HEAD) :].rstrip()[: -len(_TAIL)]
    usual = length > 0 and text.startswith(_HEAD) and text.rstrip().endswith(_TAIL) and body[-1:].isdigit()
    if not usual or body.translate(None, _DIGITS) or body.count(b",") != length - 1:
        return None
    try:
        tokens: IntArray = np.fromstring(body, dtype=np.int64, sep=",")
    except ValueError:
        return None
    return tokens if len(tokens) == length else None
