"""Small objects between all ranks of the job, over `torch.distributed`. Tensors of a step never travel this way."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class ProcessComm:
    """`checkpoint.agree.Comm` over all ranks.

    Args:
        device: Where a one-number collective lives (the GPU with NCCL).
        group: Of all ranks; None: the default process group.
    """

    def __init__(self, device: torch.device | str = "cpu", *, group: dist.ProcessGroup | None = None):
        self._group = group
        self._number = torch.zeros(1, dtype=torch.int32, device=device)

    @classmethod
    def for_a_thread(cls) -> ProcessComm:
        """One over a process group of its own: what a thread says must not meet what another one says.

        Called by all ranks together.
        """
        return cls(group=dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def gather(self, obj: Any) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self._group)
        return objects if self.rank == 0 else None

    def broadcast(self, obj: Any) -> Any:
        if self.world_size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def any(self, value: bool) -> bool:
        """True on every rank if `value` is true on one; a collective of one number."""
        return bool(self.largest(int(value)))

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers (32 bits), on every rank; a collective of one number."""
        if self.world_size == 1:
            return value
        self._number.fill_(value)
        dist.all_reduce(self._number, op=dist.ReduceOp.MAX, group=self._group)
        return int(self._number.item())
