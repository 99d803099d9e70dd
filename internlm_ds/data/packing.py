"""From samples to micro-batches of a fixed number of tokens: the three behaviours of InternLM, one class each.

Every file is packed on its own, its samples in an order shuffled once and for all (seed 1024); a pack never crosses
files and the tokens that do not fill one are dropped. `SegmentPacker` keeps the borders of samples (the default),
`FixedSegmentPacker` ignores them (`pack_sample_into_one`), `PaddedBatcher` gives each sample a row of its own
(`use_packed_dataset=False`). The order in which packs are trained is `sampler`'s, the last step to model input
`collate`'s. The slow obvious versions are in `oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.metarows import PACKING_SEED
from internlm_ds.data.samples import KeptSamples, Samples, span_lengths

BorderArray = npt.NDArray[np.int32]

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
    borders = cu_seqlens[: cu_seqlens.searchsorted(cu_seqlens[-1]) + 1].astype(np.int64)  # without padding
    return np.arange(int(borders[-1]), dtype=np.int64) - np.repeat(borders[:-1], borders[1:] - borders[:-1])


def segment_borders(lengths: Sequence[int] | IntArray, *, seq_len: int) -> BorderArray:
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
    pieces = np.asarray(lengths, dtype=np.int64)
    assert (pieces > 0).all(), f"empty pieces in {lengths}"
    segments = -(-pieces // seq_len)
    # every segment is a whole one but the last of its piece
    sizes = np.full(int(segments.sum()), seq_len, dtype=np.int64)
    sizes[np.cumsum(segments) - 1] = pieces - (segments - 1) * seq_len
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def shuffled(samples: Samples) -> Samples:
    """The samples in the order in which a file is packed: the same in every run and epoch.

    Source: InternEvo `PackedDataset.accu_sample_len`.
    """
    if isinstance(samples, KeptSamples):
        return samples.packed()  # may be known from an earlier run
    order = np.arange(len(samples))
    np.random.RandomState(PACKING_SEED).shuffle(order)
    return samples.take(order)


@dataclass(frozen=True)
class Span:
    """Which samples make up a pack, as numbers in the packer's shuffled `samples`.

    Attributes:
        first, stop: Samples `first` to `stop - 1`; the first and the last may lie in it in part only.
        skip: Tokens of sample `first` that belong to earlier packs.
    """

    first: int
    stop: int
    skip: int


class StreamPacker:
    """Pack i is tokens `[i * P, (i + 1) * P)` of the concatenated samples; finding them is two binary searches.

    Attributes:
        samples: The file's samples in the order of packing; `samples.ends` says where each stands in the stream.
    """

    sees_beyond_cut = True

    def __init__(self, samples: Samples, *, packed_length: int, seq_len: int):
        self.packed_length, self.seq_len = packed_length, seq_len
        self.samples = shuffled(samples)
        self._ends = self.samples.ends

    def __len__(self) -> int:
        return int(self._ends[-1]) // self.packed_length if len(self._ends) else 0

    def __getitem__(self, index: int) -> Pack:
        tokens, labels, lengths = self._fill(self.span(index))
        return Pack(tokens, labels, self.borders(lengths), np.full_like(tokens, self.samples.type_id))

    def span(self, index: int) -> Span:
        """The samples of pack `index`."""
        start = _checked(index, len(self)) * self.packed_length
        ends = self._ends
        first = int(ends.searchsorted(start, side="right"))
        # nearly always among the next few hundred: a search there touches memory that the samples' own numbers share
        last = first + int(ends[first : first + 256].searchsorted(start + self.packed_length))
        if last == first + 256:
            last = int(ends.searchsorted(start + self.packed_length))
        return Span(first, last + 1, start - (int(ends[first - 1]) if first else 0))

    def lengths(self, span: Span) -> IntArray:
        """Tokens of each whole sample of a span, int64."""
        return span_lengths(self._ends, span.first, span.stop)

    def borders(self, pieces: IntArray) -> BorderArray:
        """Borders of a pack that holds `pieces[j]` tokens of its j-th sample."""
        raise NotImplementedError

    def _fill(self, span: Span) -> tuple[IntArray, IntArray, IntArray]:
        """Tokens, labels and tokens of each piece; the label behind a cut sample is its next token, or none."""
        signed, lengths, stop = self.samples.read_span(span.first, span.stop), self.lengths(span), span.skip
        stop += self.packed_length
        is_cut = stop < len(signed)
        labels = np.empty(self.packed_length, dtype=np.int64)
        following = signed[span.skip + 1 : stop + 1]
        labels[: len(following)] = following
        sample_ends = np.cumsum(lengths)
        labels[sample_ends[sample_ends <= stop][lengths[sample_ends <= stop] > 0] - span.skip - 1] = IGNORED
        if is_cut and not self.sees_beyond_cut:
            labels[-1] = IGNORED
        pieces = np.diff(np.minimum(sample_ends, stop), prepend=span.skip)
        return signed[span.skip : stop], labels, pieces[pieces > 0]


class SegmentPacker(StreamPacker):
    """Cut packing: attention sees one sample at a time, in segments of at most `seq_len` tokens.

    Labels run on over the borders inside a sample, and over the cut at the end of the pack. A sample that began in
    the pack before starts again at position 0.

    Source: InternEvo `PackedDatasetWithCut`.
    """

    def borders(self, pieces: IntArray) -> BorderArray:
        return segment_borders(pieces, seq_len=self.seq_len)


class FixedSegmentPacker(StreamPacker):
    """`pack_sample_into_one`: attention sees rows of `seq_len` tokens, whatever samples they hold.

    No label crosses a sample's end, nor the cut at the end of the pack. `packed_length` is a multiple of `seq_len`.

    Source: InternEvo `PackedDatasetWithoutCuSeqlen`.
    """

    sees_beyond_cut = False

    def borders(self, pieces: IntArray) -> BorderArray:
        return np.arange(0, self.packed_length + 1, self.seq_len, dtype=np.int32)


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
        stop_at = min(first + self.rows, len(self.samples))
        for row in _rows_of(self.samples, first, stop_at, seq_len=self.seq_len):
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

    Attributes:
        parts: One packer a file.
        ends: int64 `(parts,)`; packs of all parts up to and including each.

    Source: torch `ConcatDataset`, which InternEvo uses here.
    """

    def __init__(self, parts: Sequence[PackSource]):
        self.parts = tuple(parts)
        self.ends: IntArray = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Pack:
        part, number = self.locate(index)
        return part[number]

    def locate(self, index: int) -> tuple[PackSource, int]:
        """The packer that makes pack `index`, and the pack's number there."""
        _checked(index, len(self))
        place = int(self.ends.searchsorted(index, side="right"))
        return self.parts[place], int(index) - (int(self.ends[place - 1]) if place else 0)


def _rows_of(samples: Samples, first: int, stop: int, *, seq_len: int) -> Iterator[IntArray]:
    """Samples one by one, each cut to `seq_len`, read in one call."""
    if first < stop:
        ends = samples.ends[first:stop] - (samples.ends[first - 1] if first else 0)
        signed = samples.read_span(first, stop)
        for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
            yield signed[begin : min(end, begin + seq_len)]


def _checked(index: int, length: int) -> int:
    if not 0 <= index < length:
        raise IndexError(f"pack {index} of {length}")
    return int(index)
