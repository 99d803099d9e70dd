"""Which part of a parameter each tensor rank holds, on paper.

The blueprint (`arch`) says along which dimension a parameter is split; here that becomes ranges of indices. Layers,
initial values and checkpoints all cut by them, so they cannot disagree. Cutting tensors is `parallel.shards`'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.errors import LayoutError

Span = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """What one tensor rank holds of a parameter: ranges of indices along one dimension, one after another.

    Attributes:
        rank, size: The tensor rank, and the number of them.
        dim: The dimension that is split.
        length: Of the whole parameter along `dim`.
        spans: `(start, stop)` of each range in the whole; one, or three for a packed `[q; k; v]`.
    """

    rank: int
    size: int
    dim: int
    length: int
    spans: tuple[Span, ...]

    @property
    def width(self) -> int:
        """Of the shard along `dim`."""
        return sum(stop - start for start, stop in self.spans)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the shard of a parameter of shape `whole`."""
        return (*whole[: self.dim], self.width, *whole[self.dim + 1 :])

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameter that a shard of this shape was cut from."""
        return (*shape[: self.dim], self.length, *shape[self.dim + 1 :])


def bounds(count: int, *, size: int, rank: int) -> Span:
    """This rank's range of `count` units: the first `count % size` ranks get one more.

    >>> [bounds(131, size=4, rank=r) for r in range(4)]
    [(0, 33), (33, 66), (66, 99), (99, 131)]
    """
    base, rest = divmod(count, size)
    start = rank * base + min(rank, rest)
    return start, start + base + (rank < rest)


def shard_of(spec: ParamSpec, *, size: int, rank: int) -> Shard | None:
    """What a tensor rank holds of a parameter; None: all of it.

    Raises:
        LayoutError: The parameter cannot be divided so.

    >>> qkv = ParamSpec("Wqkv.weight", (12, 4), "linear", split_dim=0, parts=3, granule=2)
    >>> shard_of(qkv, size=2, rank=1).spans
    ((2, 4), (6, 8), (10, 12))
    """
    if spec.split_dim is None or size == 1:
        return None
    length = spec.shape[spec.split_dim]
    part = length // spec.parts
    units = part // spec.granule
    if (units % size and not spec.uneven) or units < size:
        what = f"{units} units" if spec.granule > 1 else f"{part} indices"
        raise LayoutError(
            f"{spec.name} {list(spec.shape)}: {what} along dimension {spec.split_dim} cannot be divided over "
            f"parallel.tensor = {size} ranks; possible here: {_possible(units, uneven=spec.uneven)}"
        )
    start, stop = (edge * spec.granule for edge in bounds(units, size=size, rank=rank))
    spans = tuple((i * part + start, i * part + stop) for i in range(spec.parts))
    return Shard(rank, size, spec.split_dim, length, spans)


def holds(spec: ParamSpec, *, rank: int) -> bool:
    """Does a tensor rank have the parameter, or a part of it, at all?"""
    return rank == 0 or not spec.on_first_tensor_rank_only


def local_shape(spec: ParamSpec, *, size: int, rank: int) -> tuple[int, ...]:
    """Shape of what a tensor rank holds."""
    shard = shard_of(spec, size=size, rank=rank)
    return tuple(spec.shape) if shard is None else shard.shape(spec.shape)


def local_numel(spec: ParamSpec, *, size: int, rank: int = 0) -> int:
    """Number of elements that a tensor rank holds, 0 where it lacks the parameter."""
    return math.prod(local_shape(spec, size=size, rank=rank)) if holds(spec, rank=rank) else 0


def _possible(units: int, *, uneven: bool) -> str:
    if uneven:
        return f"1 to {units}"
    return ", ".join(str(k) for k in range(1, units + 1) if units % k == 0)
