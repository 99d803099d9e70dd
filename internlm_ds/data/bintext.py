"""The text of a bin as training reads it: mapped into memory, many rows parsed in one call, every row checked.

There are two ways to the same tokens. `BinText.read` takes one line apart with numpy, falls back on JSON, and knows the
file, line and remedy when something is wrong; `BinText.read_rows` hands many rows at once to the compiled kernel, once
that is loaded (`kernels`), and whatever the kernel does not take to `read`. Where rows lie is `samples`' business.

A mapped file that becomes shorter kills the process that reads behind its end (SIGBUS), and one that is rewritten gives
other tokens. So size and time of the file are compared with those at the start before its pages are touched.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data import kernels
from internlm_ds.data.binformat import IntArray, decode_line
from internlm_ds.errors import DataFormatError

_HEAD, _TAIL = b'{"tokens": [', b"]}"
_DIGITS = b"0123456789, -"


@dataclass(frozen=True)
class FileState:
    """What tells that a file is still the one that was opened."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> FileState:
        """
        Raises:
            OSError: There is no such file.
        """
        found = os.stat(path)
        return cls(found.st_size, found.st_mtime_ns)


class OpenFile:
    """A file to read from at any place, by any thread; mapped into memory when the kernel asks for it.

    Single lines are read, not taken from the mapping: a page touched there may bring two megabytes into the resident
    memory of the process, and a few looks at a large file would fill it.

    Raises:
        OSError: There is no such file.
    """

    def __init__(self, path: str):
        self._handle = os.open(path, os.O_RDONLY)
        self._mapping: mmap.mmap | None = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone when a process ends
        if hasattr(self, "_handle"):
            close(self._handle)

    def line(self, offset: int, *, guess: int, before: int = 0) -> bytes:
        """The text from `offset` to its newline, which is included, or to the end.

        Args:
            guess: Bytes that are likely enough.
            before: So many bytes in front of `offset` come with it.
        """
        found = b""
        while more := os.pread(self._handle, guess + before, offset - before + len(found)):
            found += more
            if (end := found.find(b"\n", max(before, len(found) - len(more)))) >= 0:
                return found[: end + 1]
        return found

    def count_lines(self, stop: int, *, block: int = 1 << 20) -> int:
        """Newlines before byte `stop`."""
        starts = range(0, stop, block)
        return sum(os.pread(self._handle, min(block, stop - at), at).count(b"\n") for at in starts)

    @cached_property
    def array(self) -> npt.NDArray[np.uint8]:
        """The whole file mapped, uint8 `(size,)`."""
        if not os.fstat(self._handle).st_size:
            return np.zeros(0, dtype=np.uint8)  # an empty file cannot be mapped
        self._mapping = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._mapping, dtype=np.uint8)

    def forget(self) -> None:
        """Let go of the mapped pages: they would count as this process's memory until the end."""
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class OpenFiles:
    """Files by path, the oldest given up when there are too many.

    Needs no lock: a file opened twice by two threads does no harm. A copy in another process starts empty.
    """

    def __init__(self, limit: int = 256):
        self.limit = limit
        self._open: dict[str, OpenFile] = {}

    def get(self, path: str) -> OpenFile:
        found = self._open.get(path)
        if found is None:
            try:
                found = OpenFile(path)
            except OSError as error:
                raise _gone(path, error) from None
            while len(self._open) >= self.limit:
                # not closed here: another thread may be reading it; it closes with its last user
                self._open.pop(next(iter(self._open)), None)
            self._open[path] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_open": {}}


class BinText:
    """Rows of one bin file.

    Args:
        path: The bin.
        vocab_size: Ids must be below it; None leaves them unchecked.
        files: Shared by the bins of a data set.
        state: The file as it was when its meta was looked at; None leaves changes to be found by what they break.
    """

    def __init__(
        self,
        path: str,
        *,
        vocab_size: int | None = None,
        files: OpenFiles | None = None,
        state: FileState | None = None,
    ):
        self.path, self.vocab_size, self.state = path, vocab_size, state
        self.files = files or OpenFiles()

    def read(self, offset: int, length: int) -> IntArray:
        """Tokens of one row, int64 `(length,)`, signed as on disk.

        Raises:
            DataFormatError: The line is damaged, is not the one the meta describes, or has an id beyond the vocabulary;
                or the file has changed.
        """
        text = self._line_at(offset, length)
        tokens = parse_line(text, length)
        if tokens is None:
            tokens = decode_line(text, path=self.path, line=self.line_number(offset), offset_bytes=offset)
        if len(tokens) != length:
            raise self._misfit(offset, f"{len(tokens)} tokens where the meta says {length}")
        if self.vocab_size is not None and length and max(tokens.max(), -tokens.min()) >= self.vocab_size:
            raise self._beyond_vocabulary(tokens, offset)
        return tokens

    def read_rows(self, offsets: IntArray, lengths: IntArray) -> IntArray:
        """Tokens of several rows behind one another, int64 `(sum(lengths),)`; errors as `read`."""
        kernel = kernels.loaded()
        if kernel is not None:
            tokens = np.empty(int(lengths.sum()), dtype=np.int64)
            text = self.check().array  # looked at before its pages are touched
            if kernel.parse_rows(text, offsets, lengths, self.vocab_size or 0, tokens) == len(offsets):
                return tokens
        # an unusual line, which is read as JSON, or one with a fault, which is named
        rows = [self.read(int(offset), int(length)) for offset, length in zip(offsets, lengths)]
        return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)

    def line_number(self, offset: int) -> int:
        """1-based line of a byte of the bin, counted from its start: for messages and reports only."""
        return 1 + self.files.get(self.path).count_lines(offset)

    def end_of_line(self, offset: int) -> int:
        """Where the line that begins at `offset` ends, its newline included."""
        return offset + len(self.files.get(self.path).line(offset, guess=1 << 16))

    def check(self) -> OpenFile:
        """The file, if it is still as it was.

        Raises:
            DataFormatError: It has changed, or is gone.

        Between this look and the last page touched a file can still shrink; it is a look, not a lock.
        """
        if self.state is not None:
            try:
                found = FileState.of(self.path)
            except OSError as error:
                raise _gone(self.path, error) from None
            if found != self.state:
                raise self._changed(found)
        return self.files.get(self.path)

    def _line_at(self, offset: int, length: int) -> bytes:
        before = 1 if offset else 0
        text = self.check().line(offset, guess=64 + 10 * length, before=before)
        if before and text[:1] != b"\n":
            raise self._misfit(offset, "no line starts here")
        return text[before:]

    def _changed(self, found: FileState) -> DataFormatError:
        assert self.state is not None
        if found.size != self.state.size:
            what = f"the file has changed under this run: {self.state.size} bytes at the start, {found.size} now"
        else:
            what = "the file has changed under this run: it was written to since the start (same size, later time)"
        message = f"{what}; put the old file back, or start the run again (it resumes from its last checkpoint) "
        return DataFormatError(message + "with a bin and a meta that fit each other", path=self.path)

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


def _gone(path: str, error: Exception) -> DataFormatError:
    message = f"the file was there at the start and cannot be read any more ({error}); put it back and resume"
    return DataFormatError(message, path=path)
