"""Rounding fp32 to bf16 at random, so that the mean is right, with numbers that belong to elements of parameters.

Numbers are drawn a block of a parameter at a time. Every block has a stream of its own, seeded by the run's seed, the
parameter's name, the block's index and the count of updates: nothing is kept between steps, so a resumed run draws
what the uninterrupted one draws. How parameters are shared among ranks does not matter either: ranks that hold the same
element (copies of a partition, tensor ranks with a whole norm) round it alike, and all others draw other numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from internlm_ds.model.init import stream_seed

# 2 ** 16: what bf16 cuts off an fp32 number
CUT = 65536


@dataclass(frozen=True)
class Piece:
    """Part of a flattened parameter, or shard of one, where a flat tensor holds it.

    Attributes:
        name: Of the parameter, and which shard of it.
        numel: Of the whole flattened parameter or shard.
        start, count: The elements that are held: `[start, start + count)`.
        place: Where the first of them lies in the flat tensor.
    """

    name: str
    numel: int
    start: int
    count: int
    place: int


@dataclass(frozen=True)
class Part:
    """What one block and one piece share.

    Attributes:
        block: Index of the block in the parameter.
        width: Elements of the whole block, so many numbers are drawn.
        skip, count: Those of them that the piece holds: `[skip, skip + count)`.
        place: Where the first of these lies in the flat tensor.
    """

    block: int
    width: int
    skip: int
    count: int
    place: int


def parts(piece: Piece, *, block_numel: int) -> Iterator[Part]:
    """A piece cut where the blocks of its parameter end.

    >>> [(p.block, p.width, p.skip, p.count, p.place) for p in parts(Piece("w", 10, 3, 6, 100), block_numel=4)]
    [(0, 4, 3, 1, 100), (1, 4, 0, 4, 101), (2, 2, 0, 1, 105)]
    """
    stop, position = piece.start + piece.count, piece.start
    while position < stop:
        block, skip = divmod(position, block_numel)
        width = min(block_numel, piece.numel - block * block_numel)
        count = min(stop - position, width - skip)
        yield Part(block, width, skip, count, piece.place + position - piece.start)
        position += count


class Numbers:
    """The numbers of one block at one update: successive calls draw for successive tensors."""

    def __init__(self, generator: torch.Generator, *, seed: int, name: str, part: Part, update: int):
        self._generator = generator.manual_seed(stream_seed(seed, f"{name}@{part.block}:{update}"))
        self._part = part

    def draw(self) -> torch.Tensor:
        """int32 `(part.count,)`, uniform in `[0, 65536)`."""
        # of a whole block, whatever part of it is held: the others' numbers are passed over. Four of them to a word,
        # since drawing is most of the work
        words = torch.empty(-(-self._part.width // 4), dtype=torch.int64, device=self._generator.device)
        words.random_(-(2**63), None, generator=self._generator)
        held = words.view(torch.int16).narrow(0, self._part.skip, self._part.count)
        return held.to(torch.int32).bitwise_and_(CUT - 1)


def round_into(target: torch.Tensor, value: torch.Tensor, numbers: torch.Tensor) -> None:
    """Write fp32 `value` into the bf16 `target`, up or down at random so that its expectation is `value`.

    A bf16 number is the upper half of an fp32 one. A number below 2^16 added to the lower half carries over with
    probability (lower half) / 2^16, which is how near the value is to the next bf16 number away from 0. What is a bf16
    number already stays as it is.

    Args:
        target: bf16 `(n,)`.
        value: fp32 `(n,)`, contiguous.
        numbers: int32 `(n,)`, uniform in `[0, 65536)`; overwritten.
    """
    numbers.add_(value.view(torch.int32)).bitwise_and_(-CUT)
    target.copy_(numbers.view(torch.float32))
