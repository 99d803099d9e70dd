"""Samples of one file as a sequence that is read one at a time: what packing needs to know of a data set.

A source knows where each sample ends in the concatenation of all (`ends`) and reads some when asked. It holds 16 bytes
a sample, as much as a row of the meta; the tokens stay on disk. Which files there are is `catalog`'s, the bytes are
`bintext`'s, what becomes of the samples `packing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.bintext import BinText


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

    def read_span(self, first: int, stop: int) -> IntArray:
        """Tokens of samples `first` to `stop - 1` behind one another, int64, signed as on disk."""
        ...


def lengths_of(ends: IntArray) -> IntArray:
    """Lengths of samples from where they end.

    >>> lengths_of(np.array([3, 3, 7])).tolist()
    [3, 0, 4]
    """
    return np.diff(ends, prepend=0)


def joined(samples: Samples, first: int, stop: int) -> IntArray:
    """`read_span` sample by sample, for sources that have nothing better."""
    rows = [samples.read(index) for index in range(first, stop)]
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


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

    def read_span(self, first: int, stop: int) -> IntArray:
        return joined(self, first, stop)


class FileSamples:
    """Samples of one bin file.

    Args:
        text: The bin.
        offsets: int64 `(n,)`, byte offset of each sample's line.
        ends: int64 `(n,)`, see `Samples`.
        type_id: Data type of the file.
    """

    def __init__(self, text: BinText, *, offsets: IntArray, ends: IntArray, type_id: int = 0):
        self.text, self.offsets, self.ends, self.type_id = text, offsets, ends, type_id

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def path(self) -> str:
        return self.text.path

    def take(self, order: IntArray) -> FileSamples:
        ends = np.cumsum(lengths_of(self.ends)[order], dtype=np.int64)
        return FileSamples(self.text, offsets=self.offsets[order], ends=ends, type_id=self.type_id)

    def read(self, index: int) -> IntArray:
        """Tokens of one sample.

        Raises:
            DataFormatError: See `BinText.read`.
        """
        length = int(self.ends[index] - (self.ends[index - 1] if index else 0))
        return self.text.read(int(self.offsets[index]), length)

    def read_span(self, first: int, stop: int) -> IntArray:
        ends = self.ends[first:stop]
        before = self.ends[first - 1] if first else 0
        return self.text.read_rows(self.offsets[first:stop], np.diff(ends, prepend=before))
