"""From samples to micro-batches of a fixed number of tokens: the three behaviours of InternLM, one class each.

Every file is packed on its own, its samples in an order shuffled once and for all (seed 1024); a pack never crosses
files and the tokens that do not fill one are dropped. `SegmentPacker` keeps the borders of samples (the default),
`FixedSegmentPacker` ignores them (`pack_sample_into_one`), `PaddedBatcher` gives each sample a row of its own
(`use_packed_dataset=False`). The order in which packs are trained is `sampler`'s, the last step to model input
`collate`'s. The slow obvious versions are in `oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.samples import Samples

BorderArray = npt.NDArray[np.int32]

PACKING_SEED = 1024
IGNORED = -100


@dataclass(frozen=True)
class Pack:
    """One packed micro-batch; P tokens in S segments.

    Attributes:
        tokens: int64 `(P,)`, signed as on disk.
        labels: int64 `(P,)`, the next token, signed as on disk; -100 where there is none.
        cu_seqlens: int32 `(S + 1,)`, borders of segments, from 0 to P.
        type_ids: int64 `(P,)`, data type of each token.
    """

    tokens: IntArray
    labels: IntArray
    cu_seqlens: BorderArray
    type_ids: IntArray

    @property
    def indexes(self) -> IntArray:
        """int64 `(P,)`, position of each token in its segment."""
        return positions_from(self.cu_seqlens)


class PackSource(Protocol):
    """Packs by number; what sampler and loader see of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pack: ...


def positions_from(cu_seqlens: npt.NDArray[np.integer]) -> IntArray:
    """Positions that restart at 0 in every segment, int64 `(cu_seqlens[-1],)`.

    >>> positions_from(np.array([0, 2, 5])).tolist()
    [0, 1, 0, 1, 2]
    """
    starts = np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)).astype(np.int64)
    return np.arange(int(cu_seqlens[-1]), dtype=np.int64) - starts


def segment_borders(lengths: Sequence[int], *, seq_len: int) -> BorderArray:
    """Attention borders of one pack: each piece of a sample is cut every `seq_len` tokens from its own start.

    Args:
        lengths: Tokens of each piece, in order; each > 0.
        seq_len: Longest segment attention may see, in tokens.
    Returns:
        int32 `(S + 1,)`: first 0, last `sum(lengths)`, strictly rising.
    Source: InternEvo `PackedDataset.build_pack`.

    >>> segment_borders([5, 3], seq_len=4).tolist()
    [0, 4, 5, 8]
    """
    assert all(length > 0 for length in lengths), f"empty pieces in {lengths}"
    borders, start = [0], 0
    for length in lengths:
        borders.extend(range(start + seq_len, start + length, seq_len))
        start += length
        borders.append(start)
    return np.array(borders, dtype=np.int32)


def shuffled(samples: Samples) -> Samples:
    """The samples in the order in which a file is packed: the same in every run and epoch.

    Source: InternEvo `PackedDataset.accu_sample_len`.
    """
    order = np.arange(len(samples))
    np.random.RandomState(PACKING_SEED).shuffle(order)
    return samples.take(order)


class _StreamPacker:
    """Pack i is tokens `[i * P, (i + 1) * P)` of the concatenated samples; finding them is two binary searches."""

    def __init__(self, samples: Samples, *, packed_length: int, seq_len: int):
        self.packed_length, self.seq_len = packed_length, seq_len
        self.samples = shuffled(samples)
        self._ends = self.samples.ends

    def __len__(self) -> int:
        return int(self._ends[-1]) // self.packed_length if len(self._ends) else 0

    def _pieces(self, index: int) -> list[tuple[IntArray, int, int]]:
        """(sample, from, to) of each piece of a sample in pack `index`, none empty."""
        start = _checked(index, len(self)) * self.packed_length
        stop = start + self.packed_length
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        pieces = []
        for number in range(first, last + 1):
            sample = self.samples.read(number)
            begin = int(self._ends[number]) - len(sample)
            low, high = max(start - begin, 0), min(stop - begin, len(sample))
            if high > low:
                pieces.append((sample, low, high))
        return pieces

    def _fill(self, pieces: list[tuple[IntArray, int, int]], *, sees_beyond_cut: bool) -> tuple[IntArray, IntArray]:
        """Tokens and labels of a pack; the label behind a cut sample is its next token, or none."""
        tokens = np.concatenate([sample[low:high] for sample, low, high in pieces])
        labels = np.empty_like(tokens)
        labels[:-1] = tokens[1:]
        at = 0
        for sample, low, high in pieces:
            at += high - low
            labels[at - 1] = sample[high] if sees_beyond_cut and high < len(sample) else IGNORED
        return tokens, labels


class SegmentPacker(_StreamPacker):
    """Cut packing: attention sees one sample at a time, in segments of at most `seq_len` tokens.

    Labels run on over the borders inside a sample, and over the cut at the end of the pack. A sample that began in
    the pack before starts again at position 0.

    Source: InternEvo `PackedDatasetWithCut`.
    """

    def __getitem__(self, index: int) -> Pack:
        pieces = self._pieces(index)
        tokens, labels = self._fill(pieces, sees_beyond_cut=True)
        borders = segment_borders([high - low for _, low, high in pieces], seq_len=self.seq_len)
        return Pack(tokens, labels, borders, np.full_like(tokens, self.samples.type_id))


class FixedSegmentPacker(_StreamPacker):
    """`pack_sample_into_one`: attention sees rows of `seq_len` tokens, whatever samples they hold.

    No label crosses a sample's end, nor the cut at the end of the pack. `packed_length` is a multiple of `seq_len`.

    Source: InternEvo `PackedDatasetWithoutCuSeqlen`.
    """

    def __getitem__(self, index: int) -> Pack:
        tokens, labels = self._fill(self._pieces(index), sees_beyond_cut=False)
        borders = np.arange(0, self.packed_length + 1, self.seq_len, dtype=np.int32)
        return Pack(tokens, labels, borders, np.full_like(tokens, self.samples.type_id))


class PaddedBatcher:
    """Unpacked data: `packed_length // seq_len` samples a pack, each cut to `seq_len`, padding behind the last.

    The number of packs is that of the other packers (all tokens over `packed_length`), so with long samples some are
    never visited and with short ones the last packs hold fewer samples or none. Padding has token 0, label 0 and type
    0, which collation turns into no label.

    Source: InternEvo `PackedDatasetWithCut` with `use_packed_dataset=False`.
    """

    def __init__(self, samples: Samples, *, packed_length: int, seq_len: int):
        self.packed_length, self.seq_len = packed_length, seq_len
        self.rows = packed_length // seq_len
        self.samples = shuffled(samples)

    def __len__(self) -> int:
        ends = self.samples.ends
        return int(ends[-1]) // self.packed_length if len(ends) else 0

    @property
    def num_empty_packs(self) -> int:
        """Packs at the end that hold no sample at all."""
        return max(0, len(self) - -(-len(self.samples) // self.rows))

    def __getitem__(self, index: int) -> Pack:
        first = _checked(index, len(self)) * self.rows
        tokens = np.zeros(self.packed_length, dtype=np.int64)
        labels, types = np.zeros_like(tokens), np.zeros_like(tokens)
        borders = [0]
        for number in range(first, min(first + self.rows, len(self.samples))):
            row = self.samples.read(number)[: self.seq_len]
            start, stop = borders[-1], borders[-1] + len(row)
            if len(row):
                tokens[start:stop] = row
                labels[start : stop - 1], labels[stop - 1] = row[1:], IGNORED
                types[start:stop] = self.samples.type_id
                borders.append(stop)
        if borders[-1] < self.packed_length:
            borders.append(self.packed_length)
        return Pack(tokens, labels, np.array(borders, dtype=np.int32), types)


Packer = SegmentPacker | FixedSegmentPacker | PaddedBatcher


def packer_for(*, pack_sample_into_one: bool, use_packed_dataset: bool) -> Callable[..., Packer]:
    """The class that InternLM's two switches mean; `pack_sample_into_one` wins, its packs are rows already."""
    if pack_sample_into_one:
        return FixedSegmentPacker
    return SegmentPacker if use_packed_dataset else PaddedBatcher


class Concatenation:
    """Packs of several files, one file after the other.

    Source: torch `ConcatDataset`, which InternEvo uses here.
    """

    def __init__(self, parts: Sequence[PackSource]):
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Pack:
        _checked(index, len(self))
        part = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        return self.parts[part][int(index) - before]


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"pack {index} of {length}")
    return int(index)
