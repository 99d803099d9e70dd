"""From the shards that one layout stored to those that another asks for: which rows and columns come from where.

A parameter may be stored whole or cut along any dimension, and asked for whole or cut along the same or another one.
Everything here asks only for the rows of a stored piece that the wanted rows need, so that no whole parameter is ever
put together for a rank that holds a part of it. Reading the rows is the caller's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch

from internlm_ds.layout.shards import Shard, Span

# (shard, first row, last row + 1) -> these rows of the stored piece, in its shape
ReadRows = Callable[[Shard | None, int, int], torch.Tensor]


def gather_rows(
    read: ReadRows,
    stored: Iterable[Shard | None],
    *,
    wanted: Shard | None,
    shape: tuple[int, ...],
    rows: Span | None = None,
) -> torch.Tensor:
    """Rows (indices of dimension 0) of a wanted shard, out of the pieces that are stored.

    Args:
        read: Gives rows of a stored piece.
        stored: The pieces, None for a whole parameter; together they cover the parameter.
        wanted: The shard that is asked for; None: the whole parameter.
        shape: Of the whole parameter, at least 1-D.
        rows: `[start, stop)` of the wanted shard; None: all of them.
    """
    local = shape if wanted is None else wanted.shape(shape)
    start, stop = rows or (0, local[0])
    target: torch.Tensor | None = None
    filled = 0
    for held in stored:
        boxes = _boxes(held, wanted, shape=shape)
        for from_row, to_row, count in _within(boxes[0], start, stop) if all(boxes) else ():
            piece = read(held, from_row, from_row + count)
            if target is None:
                target = piece.new_empty((stop - start, *local[1:]))
            for corner in itertools.product(*boxes[1:]):
                part, place = piece, target.narrow(0, to_row - start, count)
                for dim, (source, goal, width) in enumerate(corner, start=1):
                    part, place = part.narrow(dim, source, width), place.narrow(dim, goal, width)
                place.copy_(part)
                filled += place.numel()
    wanted_numel = (stop - start) * math.prod(local[1:])
    assert filled == wanted_numel, f"{filled} elements of {wanted_numel} were found for {wanted}"
    return torch.empty((stop - start, *local[1:])) if target is None else target


def gather_range(
    read: ReadRows,
    stored: Iterable[Shard | None],
    *,
    wanted: Shard | None,
    shape: tuple[int, ...],
    start: int,
    stop: int,
) -> torch.Tensor:
    """Elements `[start, stop)` of a flattened wanted shard, `(stop - start,)`; otherwise as `gather_rows`."""
    local = shape if wanted is None else wanted.shape(shape)
    width = math.prod(local[1:])
    if stop <= start:
        return torch.empty(0)
    first, last = start // width, -(-stop // width)
    found = gather_rows(read, stored, wanted=wanted, shape=shape, rows=(first, last))
    return found.flatten()[start - first * width : stop - first * width]


def _boxes(held: Shard | None, wanted: Shard | None, *, shape: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
    """Per dimension what both hold: `(index in held, index in wanted, count)`."""
    return [
        _overlaps(_spans(held, dim, length), _spans(wanted, dim, length))  #
        for dim, length in enumerate(shape)
    ]


def _spans(shard: Shard | None, dim: int, length: int) -> Sequence[Span]:
    return shard.spans if shard is not None and shard.dim == dim else ((0, length),)


def _overlaps(held: Sequence[Span], wanted: Sequence[Span]) -> list[tuple[int, int, int]]:
    """
    >>> _overlaps([(0, 4), (8, 12)], [(2, 10)])
    [(2, 0, 2), (4, 6, 2)]
    """
    found = []
    for held_at, (low, high) in _placed(held):
        for wanted_at, (start, stop) in _placed(wanted):
            first, last = max(low, start), min(high, stop)
            if first < last:
                found.append((held_at + first - low, wanted_at + first - start, last - first))
    return found


def _placed(spans: Sequence[Span]) -> Iterable[tuple[int, Span]]:
    """Each range with its place in the shard."""
    place = 0
    for span in spans:
        yield place, span
        place += span[1] - span[0]


def _within(boxes: Iterable[tuple[int, int, int]], start: int, stop: int) -> Iterable[tuple[int, int, int]]:
    """The part of the boxes that lies in `[start, stop)` of what is wanted."""
    for source, goal, count in boxes:
        first, last = max(goal, start), min(goal + count, stop)
        if first < last:
            yield source + first - goal, first, last - first
