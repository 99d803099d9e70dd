"""Gradients that sequence parallelism leaves incomplete: each tensor rank saw its own tokens only.

Parameters that are whole on every tensor rank but read split activations (norms) carry `sequence_parallel = True`;
their gradients are summed over tensor ranks once a step, in one bucket per dtype, before the data-parallel reduction.
DeepSpeed itself never reduces over this axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

if TYPE_CHECKING:
    from internlm_ds.engine.engine import Engine


def split_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of a stage whose gradients are sums over tensor ranks."""
    return [p for p in module.parameters() if getattr(p, "sequence_parallel", False)]


@torch.no_grad()
def sum_over_tensor_ranks(engine: Engine, parameters: Sequence[torch.nn.Parameter]) -> None:
    """Complete the gradients of `parameters` in place, where the optimizer will look for them."""
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = _gradient(engine, parameter)
        assert gradient is not None, f"{parameter.logical_name} has no gradient on this tensor rank"
        by_dtype[gradient.dtype].append(gradient)
    for gradients in by_dtype.values():
        bucket = _flatten_dense_tensors(gradients)
        dist.all_reduce(bucket, group=engine.grid.get_slice_parallel_group())
        for gradient, total in zip(gradients, _unflatten_dense_tensors(bucket, gradients), strict=True):
            gradient.copy_(total)


def _gradient(engine: Engine, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """What will be reduced over data-parallel ranks."""
    if engine.using_bf16_optimizer:
        return parameter._hp_grad
    return engine.optimizer.get_gradient_for_reduction(parameter)
