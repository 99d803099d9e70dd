"""Groups of InternLM's weight parallelism (`isp`), on paper only: training with it is refused.

There every rank of a stage holds a slice of the blocks' weights, and ZeRO shares optimizer states among ranks that hold
the same slice. Files of such runs are named by these groups.

Source: InternEvo `process_group_initializer` (March 2024): WEIGHT, WEIGHT_DATA and isp's ZERO1.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm_ds.errors import LayoutError
from internlm_ds.layout.ranks import Groups


@dataclass(frozen=True)
class WeightLayout:
    """Ranks of a job by the slice of weights they hold.

    Attributes:
        world_size: All ranks.
        pipe: Pipeline stages.
        weight: Ranks that a weight is split over.
        zero: Ranks that share the optimizer states of a slice; 0 or less means all that hold it.

    >>> WeightLayout(world_size=8, weight=4).weight_data_groups
    ((0, 4), (1, 5), (2, 6), (3, 7))
    """

    world_size: int
    pipe: int = 1
    weight: int = 1
    zero: int = -1

    def __post_init__(self) -> None:
        if self.world_size % (self.pipe * self.weight):
            raise LayoutError(
                f"parallel.weight = {self.weight}: pipeline x weight = {self.pipe * self.weight} "
                f"must divide the world size = {self.world_size}"
            )
        if self.weight_data % self.zero_size:
            raise LayoutError(f"parallel.zero1 = {self.zero}: must divide the weight-data size = {self.weight_data}")

    @property
    def weight_data(self) -> int:
        """Ranks of a stage that hold the same slice."""
        return self.world_size // (self.pipe * self.weight)

    @property
    def zero_size(self) -> int:
        return self.zero if self.zero > 0 else self.weight_data

    @property
    def weight_groups(self) -> Groups:
        """Blocks of `weight` neighbours."""
        return self._strided(length=self.weight, stride=1)

    @property
    def weight_data_groups(self) -> Groups:
        """Ranks of a stage that hold the same slice."""
        return self._strided(length=self.weight_data, stride=self.weight)

    @property
    def zero_groups(self) -> Groups:
        """Runs of `zero` holders of the same slice."""
        return self._strided(length=self.zero_size, stride=self.weight)

    def _strided(self, *, length: int, stride: int) -> Groups:
        """Blocks of `length * stride` ranks, each dealt out to `stride` groups."""
        block = length * stride
        return tuple(
            tuple(range(first + offset, first + block, stride))
            for first in range(0, self.world_size, block)
            for offset in range(stride)
        )
