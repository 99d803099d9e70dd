"""How InternLM divides whole parameters over zero ranks.

Our engine shares flat ranges instead; this is what the start-up line `Number of elements on ranks: […]` reports, and
what files of InternLM's optimizer are laid out by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internlm_ds.errors import LayoutError


@dataclass(frozen=True)
class ZeroPartition:
    """Whole parameters on zero ranks.

    Attributes:
        assignment: Per rank the indices of its parameters, in the order it got them.
        numels: Per rank the number of elements.
        plan: Per rank the strings `turn_size_size` that InternLM saves as its plan; `turn` counts the parameters from
            the largest on.
    """

    assignment: tuple[tuple[int, ...], ...]
    numels: tuple[int, ...]
    plan: tuple[tuple[str, ...], ...]

    @property
    def empty_ranks(self) -> tuple[int, ...]:
        """Ranks without a parameter."""
        return tuple(rank for rank, indices in enumerate(self.assignment) if not indices)

    def log_line(self, rank: int) -> str:
        """The tutorial's start-up line, for one rank."""
        return f"Number of elements on ranks: {list(self.numels)}, rank:{rank}"


def partition(shapes: Sequence[Sequence[int]], *, zero_size: int) -> ZeroPartition:
    """Give each parameter, largest first, to the rank with the fewest elements so far (the lowest on a tie).

    Args:
        shapes: Shapes in the order of the model; equal sizes keep that order.
        zero_size: Ranks of a zero group.
    Raises:
        LayoutError: `zero_size` is below 1.
    Source: InternEvo `HybridZeroOptimizer._partition_param_list`.

    >>> partition([[5], [5], [5], [5]], zero_size=3).assignment
    ((0, 3), (1,), (2,))
    """
    if zero_size < 1:
        raise LayoutError(f"a zero group needs at least one rank, got {zero_size}")
    sizes = [_numel(shape) for shape in shapes]
    assignment: list[list[int]] = [[] for _ in range(zero_size)]
    plan: list[list[str]] = [[] for _ in range(zero_size)]
    numels = [0] * zero_size
    for turn, index in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        rank = numels.index(min(numels))
        assignment[rank].append(index)
        plan[rank].append("_".join(map(str, (turn, *shapes[index]))))
        numels[rank] += sizes[index]
    return ZeroPartition(tuple(map(tuple, assignment)), tuple(numels), tuple(map(tuple, plan)))


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
