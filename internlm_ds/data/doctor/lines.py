"""What a bin holds, line by line, whatever its meta says: the slow and obvious scan.

It is the oracle of the compiled scan and takes its place for small files. What the numbers mean for training is
`checks`' business.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internlm_ds.data.binmeta import IntArray, decode_line
from internlm_ds.errors import DataFormatError


@dataclass(frozen=True)
class BadLine:
    """A line that holds no sample, and why."""

    line: int
    offset_bytes: int
    message: str


@dataclass(frozen=True)
class Lines:
    """The samples of a bin, n of them, in file order; bad lines are apart.

    Attributes:
        size: Bytes of the bin.
        num_lines: Lines, bad ones included.
        numbers: int64 `(n,)`, 1-based line of each sample.
        offsets: int64 `(n,)`, byte at which each line begins.
        lengths: int64 `(n,)`, tokens of each.
        learned: int64 `(n,)`, tokens that are a target: positive and not the first.
        largest: int64 `(n,)`, largest absolute id, -1 in an empty sample.
        bad: Lines that hold no sample.
        has_end: The last line ends with a newline, or there is none.
    """

    size: int
    num_lines: int
    numbers: IntArray
    offsets: IntArray
    lengths: IntArray
    learned: IntArray
    largest: IntArray
    bad: tuple[BadLine, ...]
    has_end: bool

    def __len__(self) -> int:
        return len(self.offsets)


def scan_plainly(path: str) -> Lines:
    """The lines of a bin, by `json`.

    Raises:
        OSError: The file cannot be read.
    """
    columns = [array("q") for _ in range(5)]
    bad, number, position, text = [], 0, 0, b"\n"
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                row = _measures(decode_line(text, path=path, line=number, offset_bytes=position))
            except DataFormatError as error:
                bad.append(BadLine(number, position, _what(error)))
            else:
                for column, value in zip(columns, (number, position, *row)):
                    column.append(value)
            position += len(text)
    numbers, offsets, lengths, learned, largest = map(_as_int64, columns)
    size = os.path.getsize(path)
    return Lines(size, number, numbers, offsets, lengths, learned, largest, tuple(bad), text.endswith(b"\n"))


def _as_int64(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64) if len(values) else np.zeros(0, dtype=np.int64)


def _measures(tokens: IntArray) -> Iterator[int]:
    """Length, targets and largest absolute id of a sample."""
    yield len(tokens)
    yield int((tokens[1:] > 0).sum())
    yield int(np.abs(tokens).max()) if len(tokens) else -1


def _what(error: DataFormatError) -> str:
    """The message without the place, which a finding has apart, and without its remedy."""
    return str(error).split(": ", 1)[1].split("; a line of a bin", 1)[0]
