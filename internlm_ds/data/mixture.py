"""Which pack comes next when sources have weights: a pure function of seed, weights and place in the stream.

The stream of packs is divided into blocks. How many packs of a block each source gives is found by systematic sampling:
equally spaced points, moved by an offset of the block's own, fall into intervals as wide as the shares. A share of 0.3
gives 19 or 20 of 64, on average exactly 19.2, and offsets that follow the golden ratio keep the sum over many blocks
within a few packs of the share. Within a block the sources are shuffled. Each source deals its packs in passes of its
own, each pass shuffled anew.

Nothing depends on ranks or batches, so a run can go on at any place with other ones. From weights of a configuration to
sources, and from the stream to batches, is `weighted`'s.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray

BLOCK = 64
"""Packs of a block."""

_BLOCKS = 256  # shuffled with one generator; making one costs as much as shuffling thousands of packs
_GROUP = BLOCK * _BLOCKS
_UNIT = 32  # shares are counted in parts of 2^-32 of a pack
_GOLDEN = 2654435769  # 2^32 over the golden ratio: the offsets of any run of blocks lie evenly
_CHUNK = 1 << 16  # blocks whose counts are made at once


@dataclass(frozen=True, eq=False)
class Source:
    """Packs that share a weight.

    Attributes:
        name: The key of `data_weights`; seeds the order of its packs.
        weight: Above 0; shares are weights over their sum.
        numbers: int64 `(packs,)`, its packs in the training set.
    """

    name: str
    weight: float
    numbers: IntArray


class Mixture:
    """The endless stream of packs of weighted sources.

    Args:
        sources: At least one, each with at least one pack.
        seed: `data.seed`, below 2^32.
        drawn_before: Packs that sources gave before place 0 of this stream, by name; they go on behind them.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, drawn_before: Mapping[str, int] | None = None):
        self.sources, self.seed = tuple(sources), seed
        self.drawn_before = {source.name: int((drawn_before or {}).get(source.name, 0)) for source in sources}
        self.edges = share_edges([source.weight for source in sources])
        # random, so that every place of the stream expects each source at exactly its share
        self._offset = int(np.random.RandomState(seed).randint(0, 1 << _UNIT, dtype=np.uint64))
        self._counted: tuple[int, IntArray] = (0, np.zeros(len(sources), dtype=np.int64))
        self._last_group: tuple[int, IntArray] = (-1, np.zeros(0, dtype=np.int64))
        self._passes: dict[tuple[int, int], IntArray] = {}

    @property
    def shares(self) -> dict[str, float]:
        """Share of the stream by source; they sum to 1."""
        total = sum(source.weight for source in self.sources)
        return {source.name: source.weight / total for source in self.sources}

    def numbers(self, start: int, count: int) -> IntArray:
        """Pack numbers at places `[start, start + count)` of the stream, int64 `(count,)`."""
        order = self.source_order(start, count)
        before = self._drawn(start)
        found = np.empty(count, dtype=np.int64)
        for place, source in enumerate(self.sources):
            mine = np.flatnonzero(order == place)
            first = int(before[place]) + self.drawn_before[source.name]
            found[mine] = self._dealt(place, first, len(mine))
        return found

    def source_order(self, start: int, count: int) -> IntArray:
        """Which source gives each pack of places `[start, start + count)`, int64 `(count,)`."""
        first, last = start // _GROUP, -(-(start + count) // _GROUP)
        groups = [self._group(number) for number in range(first, last)] or [np.zeros(0, dtype=np.int64)]
        return np.concatenate(groups)[start - first * _GROUP :][:count]

    def drawn(self, place: int) -> dict[str, int]:
        """Packs that each source has given before a place of the stream, those before the stream included."""
        return {
            source.name: int(count) + self.drawn_before[source.name]
            for source, count in zip(self.sources, self._drawn(place))
        }

    def _drawn(self, place: int) -> IntArray:
        block, rest = divmod(place, BLOCK)
        counted = self._drawn_in_blocks(block)
        if rest:
            counted = counted + np.bincount(self.source_order(block * BLOCK, rest), minlength=len(self.sources))
        return counted

    def _drawn_in_blocks(self, block: int) -> IntArray:
        """Packs of each source in blocks `[0, block)`."""
        known, counted = self._counted if self._counted[0] <= block else (0, np.zeros_like(self._counted[1]))
        for first in range(known, block, _CHUNK):
            counted = counted + self._block_counts(first, min(first + _CHUNK, block)).sum(axis=0)
        self._counted = block, counted
        return counted

    def _block_counts(self, first: int, stop: int) -> IntArray:
        """Packs of each source in each of blocks `[first, stop)`, int64 `(blocks, sources)`."""
        return np.diff(self._block_edges(first, stop), prepend=0, axis=1)

    def _block_edges(self, first: int, stop: int) -> IntArray:
        """Points of each block that fall before the end of each source's interval, int64 `(blocks, sources)`."""
        blocks = np.arange(first, stop, dtype=np.uint64)
        offsets = (blocks * np.uint64(_GOLDEN) + np.uint64(self._offset)) & np.uint64((1 << _UNIT) - 1)
        # points lie at (i + offset) / BLOCK: before an edge e are ceil(e * BLOCK - offset)
        before: IntArray = -((offsets.astype(np.int64)[:, None] - self.edges) >> _UNIT)
        return before

    def _group(self, number: int) -> IntArray:
        """Sources of a run of blocks that are shuffled with one generator, int64 `(_GROUP,)`."""
        if self._last_group[0] == number:  # a small data set asks for the same ones again, epoch after epoch
            return self._last_group[1]
        counts = self._block_counts(number * _BLOCKS, (number + 1) * _BLOCKS)
        places = np.tile(np.arange(len(self.sources)), _BLOCKS)
        sorted_sources = np.repeat(places, counts.ravel()).reshape(_BLOCKS, BLOCK)
        keys = np.random.RandomState([self.seed, 0, number]).random_sample((_BLOCKS, BLOCK))
        order = np.take_along_axis(sorted_sources, keys.argsort(axis=1, kind="stable"), axis=1).ravel()
        self._last_group = number, order
        return order

    def _dealt(self, place: int, first: int, count: int) -> IntArray:
        """Draws `[first, first + count)` of a source over all its passes, as pack numbers."""
        size = len(self.sources[place].numbers)
        parts = [
            self._pass(place, number)[max(first - number * size, 0) : first + count - number * size]
            for number in _touched(first, count, size)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _pass(self, place: int, number: int) -> IntArray:
        """The packs of a source in the order of one of its passes."""
        if (place, number) not in self._passes:
            source = self.sources[place]
            rng = np.random.RandomState([self.seed, 1, zlib.crc32(source.name.encode()), number])
            # the one before is not needed any more, the next one soon
            self._passes = {key: kept for key, kept in self._passes.items() if key[0] != place}
            self._passes[place, number] = source.numbers[rng.permutation(len(source.numbers))]
        return self._passes[place, number]


def share_edges(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """Where the interval of each source ends among the `BLOCK` points of a block, in parts of 2^-32.

    >>> (share_edges([1, 3]) / 2**32).tolist()
    [16.0, 64.0]
    """
    total, before, edges = sum(weights), 0.0, []
    for weight in weights:
        before += weight
        edges.append(round(before / total * (BLOCK << _UNIT)))
    edges[-1] = BLOCK << _UNIT  # whatever rounding did to the sum
    return np.array(edges, dtype=np.int64)


def _touched(first: int, count: int, size: int) -> Iterator[int]:
    """Passes of `size` draws that draws `[first, first + count)` reach into."""
    if count:
        yield from range(first // size, (first + count - 1) // size + 1)
