"""Reading a bin: samples through its meta, offsets from the bin itself, and every way in which the two disagree."""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internlm_ds.data.binformat import (
    REMEDY,
    IntArray,
    decode_line,
    meta_path,
    meta_table,
    npy_bytes,
    read_meta,
    write_whole,
)
from internlm_ds.errors import DataFormatError


def scan(path: str | os.PathLike[str]) -> tuple[IntArray, IntArray]:
    """Offsets and lengths (int64) read from the bin itself, line by line.

    Raises:
        DataFormatError: A line is damaged; the last one lacks its end.
    """
    offsets, lengths, position = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            tokens = decode_line(text, path=os.fspath(path), line=number, offset_bytes=position)
            offsets.append(position)
            lengths.append(len(tokens))
            position += len(text)
    return _as_int64(offsets), _as_int64(lengths)


def rebuild_meta(path: str | os.PathLike[str]) -> Path:
    """Write the meta (int64) that fits a bin, from the bin alone; returns its path."""
    offsets, lengths = scan(path)
    write_whole(meta_path(path), npy_bytes(meta_table(offsets, lengths, dtype="int64")))
    return meta_path(path)


class Reader:
    """Random access to the samples of one bin through its meta; memory is the meta's rows, the bin stays mapped.

    Attributes:
        path: The bin, as given.
        offsets: int64 `(n,)`, byte offset of each line.
        lengths: int64 `(n,)`, tokens of each sample.

    Opening checks that the meta exists and fits the bin's size and last line; `tokens` checks the line it reads.

    Raises:
        DataFormatError: Bin or meta is missing, damaged, or they do not fit each other.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise DataFormatError("no such bin file", path=self.path)
        self.offsets, self.lengths = read_meta(self.path)
        self._size = os.path.getsize(self.path)
        self._map = self._open_map()
        self._check_fit()

    def __len__(self) -> int:
        return len(self.offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # a mapping cannot be pickled; worker processes map the file themselves
        return (Reader, (self.path,))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def tokens(self, index: int) -> IntArray:
        """Tokens of a sample, int64, signed as on disk.

        Raises:
            DataFormatError: The line is damaged, or is not the one the meta describes.
            IndexError: There is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.path}")
        offset = int(self.offsets[index])
        if offset and self._map[offset - 1] != 0x0A:
            raise self._misfit(index, f"meta row {index} points into the middle of a line")
        end = self._map.find(b"\n", offset) + 1
        text = self._map[offset : end or self._size]
        found = decode_line(text, path=self.path, line=index + 1, offset_bytes=offset)
        if len(found) != self.lengths[index]:
            raise self._misfit(index, f"{len(found)} tokens where the meta says {self.lengths[index]}")
        return found

    def __iter__(self) -> Iterator[IntArray]:
        return (self.tokens(index) for index in range(len(self)))

    def _open_map(self) -> mmap.mmap | bytes:
        if self._size == 0:
            return b""  # an empty file cannot be mapped
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_fit(self) -> None:
        """Cheap checks over all rows, and the last line whole: that is where an interrupted writer leaves its trace."""
        if len(self) == 0:
            if self._size:
                raise self._misfit(None, f"the meta is empty but the bin holds {self._size} bytes")
            return
        outside = np.flatnonzero((self.offsets < 0) | (self.offsets >= self._size) | (self.lengths < 0))
        if len(outside):
            row = int(outside[0])
            pair = (int(self.offsets[row]), int(self.lengths[row]))
            raise self._misfit(row, f"meta row {row} says {pair} (offset, tokens), the bin has {self._size} bytes")
        last = int(np.argmax(self.offsets))
        self.tokens(last)
        end = self._map.find(b"\n", int(self.offsets[last])) + 1
        if end and end != self._size:
            rest = self._size - end
            raise self._misfit(last, f"the bin goes on for {rest} bytes behind the last line that the meta knows")

    def _misfit(self, index: int | None, what: str) -> DataFormatError:
        return DataFormatError(
            f"{what}: {meta_path(self.path)} does not fit this bin. To mend it: {REMEDY}",
            path=self.path,
            line=None if index is None else index + 1,
            offset_bytes=None if index is None else int(self.offsets[index]),
        )


def _as_int64(values: array[int]) -> IntArray:
    return np.frombuffer(values, dtype=np.int64).copy() if len(values) else np.zeros(0, dtype=np.int64)
