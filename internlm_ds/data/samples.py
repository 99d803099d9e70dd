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
from internlm_ds.data.metarows import MetaRows, Order
from internlm_ds.data.side_file import SideFile


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


def span_lengths(ends: IntArray, first: int, stop: int) -> IntArray:
    """Lengths of samples `first` to `stop - 1`, int64.

    >>> span_lengths(np.array([3, 3, 7]), 1, 3).tolist()
    [0, 4]
    """
    if first:
        return ends[first:stop] - ends[first - 1 : stop - 1]
    return np.diff(ends[:stop], prepend=0)


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
        order: Which samples, in what order, and where they lie.
        type_id: Data type of the file.
        ids: The bin's side file, read in place of its text.
    """

    def __init__(self, text: BinText, order: Order, *, type_id: int = 0, ids: SideFile | None = None):
        self.text, self.order, self.type_id, self.ids = text, order, type_id, ids

    def __len__(self) -> int:
        return len(self.order.offsets)

    @property
    def path(self) -> str:
        return self.text.path

    @property
    def ends(self) -> IntArray:
        return self.order.ends

    def take(self, order: IntArray) -> FileSamples:
        return FileSamples(self.text, self.order.take(order), type_id=self.type_id, ids=self.ids)

    def read(self, index: int) -> IntArray:
        """Tokens of one sample.

        Raises:
            DataFormatError: See `BinText.read`.
        """
        ends = self.order.ends
        length = int(ends[index] - (ends[index - 1] if index else 0))
        return self.text.read(int(self.order.offsets[index]), length)

    def read_span(self, first: int, stop: int) -> IntArray:
        if self.ids is not None:
            self.text.check()
            found = self.ids.read_rows(self.order.rows[first:stop], vocab_size=self.text.vocab_size)
            if found is not None:
                return found
        lengths = span_lengths(self.order.ends, first, stop)
        return self.text.read_rows(self.order.offsets[first:stop], lengths)


class KeptSamples(FileSamples):
    """The samples of a bin that are long enough, in file order; the arrays are made when they are asked for.

    Training asks for them `packed` only, and then a large file is not read at all but mapped.
    """

    def __init__(self, text: BinText, rows: MetaRows, *, type_id: int = 0, ids: SideFile | None = None):
        self.text, self.rows, self.type_id, self.ids = text, rows, type_id, ids

    def __len__(self) -> int:
        return self.rows.counts.kept_samples

    @property
    def order(self) -> Order:  # type: ignore[override]
        return self.rows.in_file_order

    def packed(self) -> FileSamples:
        """The same samples in the order of packing."""
        return FileSamples(self.text, self.rows.in_packing_order, type_id=self.type_id, ids=self.ids)
