"""Gradients where the optimizer wants them: one flat tensor per group of parameters, laid out as their weights are.

DeepSpeed lets autograd make gradients, copies them into a bucket to reduce them, from there into its partition, and
joins the partition anew at every step. Here each `parameter.grad` is a piece of the flat tensor: backward passes add
to it, it is reduced where it lies, and the optimizer's share is a slice of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup


def possible(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether the optimizer's settings leave gradients as autograd makes them.

    Not so where they are summed in another dtype or sent in another one, and where the optimizer lies on the host.
    """
    return not (
        optimizer.cpu_offload
        or optimizer.partition_gradients
        or optimizer.overlap_comm
        or optimizer.use_grad_accum_attribute
        or not optimizer.gradient_average
        or not optimizer.reduce_scatter
        or optimizer.communication_data_type != optimizer.dtype
    )


class FlatGradients:
    """The gradients of all parameters of a ZeRO-1 optimizer.

    Attributes:
        attached: Whether parameters hold their pieces: from the start of a step until its update.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer):
        self.attached = False
        self._group = optimizer.dp_process_group
        self._size, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._flats: list[torch.Tensor] = []
        self._pieces: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._partitions: list[GradPartitionBufferGroup] = []
        for i, weights in enumerate(optimizer.bit16_groups_flat):
            flat = torch.zeros_like(weights)
            self._flats.append(flat)
            places = {p: p.data.storage_offset() - weights.storage_offset() for p in optimizer.bit16_groups[i]}
            for parameter, start in places.items():
                piece = flat.narrow(0, start, parameter.numel()).view_as(parameter)
                self._pieces.append((parameter, piece))
            size = flat.numel() // self._size
            own = flat.narrow(0, self._rank * size, size)
            shares = []
            for parameter in optimizer.params_in_partition[i]:
                first = max(places[parameter], self._rank * size)
                last = min(places[parameter] + parameter.numel(), (self._rank + 1) * size)
                shares.append(flat.narrow(0, first, last - first))
            self._partitions.append(GradPartitionBufferGroup(shares, own))

    def attach(self) -> None:
        """Before a step's first backward pass: all gradients are 0."""
        for flat in self._flats:
            flat.zero_()
        for parameter, piece in self._pieces:
            parameter.grad = piece
        self.attached = True

    @torch.no_grad()
    def reduce(self) -> list[GradPartitionBufferGroup]:
        """The mean over ranks of this rank's share, by group; parameters give up their gradients."""
        for flat, partition in zip(self._flats, self._partitions, strict=True):
            if self._size > 1:
                flat.div_(self._size)
                dist.reduce_scatter_tensor(partition.flat_partition, flat, group=self._group)
        for parameter, _ in self._pieces:
            parameter.grad = None
        self.attached = False
        return self._partitions
