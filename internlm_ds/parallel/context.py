"""Where this process stands: its layout, its coordinate and one handle per axis. Frozen; made once by
`parallel.launch`.

A layer asks for the narrowest thing it uses: the `Axis` it is split over. An axis of size 1 has no group and
communicates nothing, so every layer builds on one plain CPU process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from internlm_ds.layout.ranks import Coord, Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One dimension of ranks as this process sees it.

    Attributes:
        name: `pipe`, `data` or `tensor`.
        size: Ranks along the axis.
        rank: This process' place on it, 0 … size-1.
        group: Process group of the ranks that differ from this one in this axis only; None when `size` is 1.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None

    @classmethod
    def single(cls, name: str) -> Axis:
        """The axis of a process that shares it with nobody."""
        return cls(name)


@dataclass(frozen=True)
class ParallelContext:
    """`Layout` plus this process."""

    layout: Layout
    rank: int
    local_rank: int
    coord: Coord
    device: torch.device
    pipe: Axis
    data: Axis
    tensor: Axis

    @property
    def is_log_rank(self) -> bool:
        """Tensor 0, data 0, last pipeline stage: the rank that knows the loss, and writes the log."""
        return self.rank == self.layout.log_rank

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process, no groups."""
        return cls(
            layout=Layout(),
            rank=0,
            local_rank=0,
            coord=Coord(0, 0, 0),
            device=torch.device(device),
            pipe=Axis.single("pipe"),
            data=Axis.single("data"),
            tensor=Axis.single("tensor"),
        )
