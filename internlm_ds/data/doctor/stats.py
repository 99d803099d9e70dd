"""What a data set holds, in numbers: tokens by type, lengths, learned tokens, what packing makes of them.

Numbers come from the bins themselves (`scan`), those on packing from the packers that training uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.doctor.lines import Lines
from internlm_ds.data.packing import FixedSegmentPacker, PaddedBatcher, StreamPacker
from internlm_ds.data.samples import lengths_of

IntArray = npt.NDArray[np.int64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Bucket:
    """Samples of `from_length` to `to_length - 1` tokens."""

    from_length: int
    to_length: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Holdings:
    """What some samples amount to.

    Attributes:
        learned: Tokens that are a target: neither masked, nor id 0, nor the first of a sample.
        shortest, longest: Tokens; 0 without samples.
        quantiles: Length below which that share of the samples lies.
    """

    samples: int
    tokens: int
    learned: int
    num_bytes: int
    bad_lines: int
    shortest: int
    longest: int
    mean: float
    quantiles: dict[str, int]
    histogram: tuple[Bucket, ...]

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return asdict(self)


def holdings(scanned: Sequence[Lines]) -> Holdings:
    """The numbers of these bins together.

    >>> holdings([]).samples
    0
    """
    lengths = np.concatenate([np.zeros(0, np.int64), *(lines.lengths for lines in scanned)])
    ordered = np.sort(lengths)
    places = [min(len(ordered) - 1, int(share * len(ordered))) for share in QUANTILES] if len(ordered) else []
    return Holdings(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        learned=sum(int(lines.learned.sum(dtype=np.int64)) for lines in scanned),
        num_bytes=sum(lines.size for lines in scanned),
        bad_lines=sum(lines.num_bad for lines in scanned),
        shortest=int(ordered[0]) if len(ordered) else 0,
        longest=int(ordered[-1]) if len(ordered) else 0,
        mean=float(lengths.mean()) if len(lengths) else 0.0,
        quantiles={f"{share:.0%}": int(ordered[place]) for share, place in zip(QUANTILES, places)},
        histogram=tuple(histogram(lengths)),
    )


def histogram(lengths: IntArray) -> Iterable[Bucket]:
    """Samples by powers of two, from the first that is used to the last.

    >>> [(b.from_length, b.to_length, b.samples) for b in histogram(np.array([3, 5, 6, 20]))]
    [(2, 4, 1), (4, 8, 2), (8, 16, 0), (16, 32, 1)]
    """
    # bit length: 0 -> 0, 1 -> 1, 2 and 3 -> 2, …
    numbers = np.frexp(lengths.astype(np.float64))[1]
    samples, tokens = np.bincount(numbers), np.bincount(numbers, weights=lengths)
    used = np.flatnonzero(samples)
    for number in range(int(used[0]), int(used[-1]) + 1) if len(used) else ():
        begin, end = (1 << number >> 1), 1 << number
        yield Bucket(begin, end, int(samples[number]), int(tokens[number]))


@dataclass(frozen=True)
class Packing:
    """What the packer of one file makes of it.

    Attributes:
        samples, tokens: What `min_length` leaves.
        micro_batches: Packs of `micro_bsz * seq_len` tokens.
        places: Tokens that they have room for.
        used: Tokens of samples in them.
        left_over: Tokens that are in none: the end of the file, and with unpacked data what is cut from long samples.
        segments: Pieces that attention sees as one.
        cut: Samples that lie in two micro-batches or more.
    """

    samples: int
    tokens: int
    micro_batches: int
    places: int
    used: int
    left_over: int
    segments: int
    cut: int

    @property
    def fill(self) -> float:
        """Share of the places that hold a token."""
        return self.used / self.places if self.places else 0.0

    @property
    def yield_(self) -> float:
        """Share of the tokens that an epoch trains on."""
        return self.used / self.tokens if self.tokens else 0.0

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {**asdict(self), "fill": self.fill, "yield": self.yield_}

    def __add__(self, other: Packing) -> Packing:
        mine, theirs = asdict(self), asdict(other)
        return Packing(**{key: mine[key] + theirs[key] for key in mine})


NOTHING_PACKED = Packing(0, 0, 0, 0, 0, 0, 0, 0)


def packing_of(packer: StreamPacker | PaddedBatcher) -> Packing:
    """Numbers of one file's packer; no token is read."""
    ends = packer.samples.ends
    total, packs = int(ends[-1]) if len(ends) else 0, len(packer)
    places = packs * packer.packed_length
    if isinstance(packer, PaddedBatcher):
        rows = np.minimum(lengths_of(ends)[: packs * packer.rows], packer.seq_len)
        used, segments, cut = int(rows.sum()), int((rows > 0).sum()), 0
    else:
        used = places
        seams = np.arange(packer.packed_length, places + 1, packer.packed_length)
        cut = len(np.setdiff1d(seams, ends))
        pieces = np.diff(np.union1d(ends[ends < places], seams), prepend=0)
        fixed = isinstance(packer, FixedSegmentPacker)
        segments = places // packer.seq_len if fixed else int((-(-pieces // packer.seq_len)).sum())
    return Packing(len(ends), total, packs, places, used, total - used, segments, cut)
