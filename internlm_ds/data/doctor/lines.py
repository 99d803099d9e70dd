"""What a bin holds, line by line, whatever its meta says: the columns of a scan, and the slow and obvious scan.

`measure_plainly` is the oracle of the compiled scan in `kernel` and takes its place for small files and where numba is
missing; `scan` cuts files into blocks and puts the columns together.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray, decode_line, encode_line
from internlm_ds.data.bintext import parse_line
from internlm_ds.errors import DataFormatError

SmallIntArray = npt.NDArray[np.int32]
DigestArray = npt.NDArray[np.uint64]

LARGEST_SHOWN = np.iinfo(np.int32).max
MOST_BAD_LINES = 10_000
LONGEST_ODD_LINE = 1 << 28
DIGEST_FACTOR = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class BadLine:
    """A line that holds no sample, and why."""

    line: int
    offset_bytes: int
    message: str


@dataclass(frozen=True)
class Lines:
    """The samples of a bin (or of a block of whole lines), n of them in file order; b bad lines are apart.

    Attributes:
        size: Bytes of the bin.
        num_lines: n + b.
        offsets: int64 `(n,)`, byte at which each sample's line begins.
        lengths: int64 `(n,)`, tokens of each.
        learned: int32 `(n,)`, tokens that are a target: positive and not the first.
        largest: int32 `(n,)`, largest absolute id, -1 in an empty sample, at most `LARGEST_SHOWN`.
        digests: uint64 `(n,)`, equal for equal samples.
        bad_begins, bad_ends: int64 `(b,)`, where bad lines begin and end.
        bad: The first of them, `MOST_BAD_LINES` at most, with what is wrong.
        odd: Samples whose line is not what `encode_line` writes; training reads them all the same.
        carriage_returns: Those of them that end with a carriage return and a newline.
        has_end: The last line has its newline, or there is none.
    """

    size: int
    num_lines: int
    offsets: IntArray
    lengths: IntArray
    learned: SmallIntArray
    largest: SmallIntArray
    digests: DigestArray
    bad_begins: IntArray
    bad_ends: IntArray
    bad: tuple[BadLine, ...]
    odd: int
    carriage_returns: int
    has_end: bool

    def __len__(self) -> int:
        return len(self.offsets)

    def line(self, row: int) -> int:
        """1-based line of a sample."""
        return row + 1 + int(np.searchsorted(self.bad_begins, self.offsets[row]))

    @property
    def ends(self) -> IntArray:
        """int64 `(n,)`, byte behind each sample's line."""
        begins = np.sort(np.concatenate([self.offsets, self.bad_begins, [self.size]]))
        ends: IntArray = begins[np.searchsorted(begins, self.offsets) + 1]
        return ends

    @property
    def num_bad(self) -> int:
        return len(self.bad_begins)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


def join(blocks: Sequence[Lines]) -> Lines:
    """The lines of consecutive blocks as those of one file.

    >>> whole = join([measure_plainly(b'{"tokens": [1]}\\n'), measure_plainly(b'?\\n{"tokens": []}\\n')])
    >>> whole.offsets.tolist(), whole.bad[0].line
    ([0, 18], 2)
    """
    starts = np.cumsum([0, *(block.size for block in blocks)], dtype=np.int64).tolist()
    before = np.cumsum([0, *(block.num_lines for block in blocks)], dtype=np.int64).tolist()

    def joined(name: str, dtype: Any = np.int64, *, shifted: bool = False) -> Any:
        parts = [getattr(block, name) + (start if shifted else 0) for block, start in zip(blocks, starts)]
        return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)

    bad = [
        BadLine(one.line + lines, one.offset_bytes + start, one.message)
        for block, start, lines in zip(blocks, starts, before)
        for one in block.bad
    ]
    return Lines(
        size=starts[-1],
        num_lines=before[-1],
        offsets=joined("offsets", shifted=True),
        lengths=joined("lengths"),
        learned=joined("learned", np.int32),
        largest=joined("largest", np.int32),
        digests=np.concatenate([np.zeros(0, np.uint64), *(block.digests for block in blocks)]),
        bad_begins=joined("bad_begins", shifted=True),
        bad_ends=joined("bad_ends", shifted=True),
        bad=tuple(bad[:MOST_BAD_LINES]),
        odd=sum(block.odd for block in blocks),
        carriage_returns=sum(block.carriage_returns for block in blocks),
        has_end=all(block.has_end for block in blocks),
    )


class Columns:
    """Grows the columns of `Lines` one line at a time."""

    def __init__(self) -> None:
        self._rows = [array("q") for _ in range(4)]
        self._digests = array("Q")
        self._bad_begins, self._bad_ends = array("q"), array("q")
        self._bad: list[BadLine] = []
        self._odd = self._carriage_returns = self._num_lines = 0
        self._has_end = True

    def add(self, text: bytes | memoryview, *, offset_bytes: int) -> None:
        """Take the next line, good or bad; `text` may be a part of one that is too long to be looked at."""
        self._num_lines += 1
        self._has_end = text[-1] == 0x0A
        size, text = len(text), bytes(text[: LONGEST_ODD_LINE + 1])
        # numpy reads the usual line four times as fast as json, but takes some that json does not
        found = parse_line(text, text.count(b",") + 1)
        is_usual = found is not None and encode_line(found.tolist()) == text
        try:
            tokens = found if found is not None and is_usual else decode_odd_line(text)
        except DataFormatError as error:
            self._bad_begins.append(offset_bytes)
            self._bad_ends.append(offset_bytes + size)
            if len(self._bad) < MOST_BAD_LINES:
                self._bad.append(BadLine(self._num_lines, offset_bytes, str(error)))
            return
        largest = int(np.abs(tokens).max()) if len(tokens) else -1
        row = (offset_bytes, len(tokens), int((tokens[1:] > 0).sum()), min(largest, int(LARGEST_SHOWN)))
        for column, value in zip(self._rows, row):
            column.append(value)
        self._digests.append(digest(tokens))
        self._odd += not is_usual and text != encode_line(tokens.tolist())
        self._carriage_returns += text.endswith(b"\r\n")

    def lines(self, size: int) -> Lines:
        """What was added, as the lines of a block of `size` bytes."""
        offsets, lengths, learned, largest = (_array(column, np.int64) for column in self._rows)
        return Lines(
            size=size,
            num_lines=self._num_lines,
            offsets=offsets,
            lengths=lengths,
            learned=learned.astype(np.int32),
            largest=largest.astype(np.int32),
            digests=_array(self._digests, np.uint64),
            bad_begins=_array(self._bad_begins, np.int64),
            bad_ends=_array(self._bad_ends, np.int64),
            bad=tuple(self._bad),
            odd=self._odd,
            carriage_returns=self._carriage_returns,
            has_end=self._has_end,
        )


def measure_plainly(block: bytes | memoryview) -> Lines:
    """The lines of a block, by `json`; the last one may lack its end.

    >>> measure_plainly(b'{"tokens": [7, -9, 3]}\\n').learned.tolist()
    [1]
    """
    columns, position = Columns(), 0
    for text in _split(bytes(block)):
        columns.add(text, offset_bytes=position)
        position += len(text)
    return columns.lines(len(block))


def decode_odd_line(text: bytes) -> IntArray:
    """Tokens of a line that is not the usual one, or an error with a message that fits what it looks like.

    Raises:
        DataFormatError: It holds no sample; the message names no place.
    """
    if len(text) > LONGEST_ODD_LINE:
        raise DataFormatError(f"a line of more than {LONGEST_ODD_LINE} bytes that is not written as lines of a bin are")
    bare = text.strip()
    if not bare:
        raise DataFormatError("an empty line")
    if not bare.strip(b"\0"):
        raise DataFormatError(f"{len(bare)} zero bytes: the disk lost what was written here")
    try:
        return decode_line(text, path="-", line=1)
    except DataFormatError as error:
        message = str(error).split(": ", 1)[1].split("; a line of a bin", 1)[0]
    if not text.endswith(b"\n"):
        message = message.replace("torn or damaged line", "the line ends in the middle:")
    if bare.startswith(b"\xef\xbb\xbf"):
        message += " (it begins with a byte order mark: a text editor wrote this file)"
    raise DataFormatError(message)


def digest(tokens: IntArray) -> int:
    """A number that is equal for equal samples: a polynomial in `DIGEST_FACTOR`, modulo 2**64.

    >>> digest(np.array([5])), digest(np.array([], dtype=np.int64))
    (11400714819323198490, 1)
    """
    powers = _powers(1 << len(tokens).bit_length())[: len(tokens) + 1]
    return (int(powers[-1]) + int(np.dot(tokens.view(np.uint64), powers[-2::-1]))) % (1 << 64)


@functools.lru_cache(maxsize=40)
def _powers(count: int) -> DigestArray:
    """The first powers of `DIGEST_FACTOR`, from the zeroth on."""
    powers = np.full(count + 1, DIGEST_FACTOR, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _split(block: bytes) -> list[bytes]:
    """Lines with their newlines; only a newline ends one."""
    lines = [line + b"\n" for line in block.split(b"\n")]
    last = lines.pop()[:-1]
    return [*lines, last] if last else lines


def _array(values: array[int], dtype: Any) -> Any:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype=dtype)
