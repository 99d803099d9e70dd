"""Collectives over one tensor axis, with their gradients, as layers use them.

An axis of size 1 is the identity: no group, no communication. Activations between two tensor regions are either whole
on every rank, or, with sequence parallelism, split along tokens: a rank then holds `t = T / size` of them. A region is
entered and left through `enter_region` and `leave_region`, which know both ways.

Source: Shoeybi et al., Megatron-LM, section 3 (f and g); Korthikanti et al., Reducing Activation Recomputation in Large
Transformer Models, section 4.2.2 (g and g-bar).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from internlm_ds.errors import LayoutError
from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.context import Axis

# torch 2.13 gave these two another name
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def share(width: int, tensor: Axis, *, what: str) -> int:
    """This rank's part of a width that is split evenly.

    Raises:
        LayoutError: The width does not divide by the axis' size.
    """
    if width % tensor.size:
        raise LayoutError(f"{what} = {width} does not divide by parallel.tensor = {tensor.size}")
    return width // tensor.size


def enter_region(x: Tensor, tensor: Axis, *, sequence_parallel: bool = False) -> Tensor:
    """What a column-parallel layer reads: every rank all tokens; the gradient is the sum over ranks.

    Args:
        x: `(T, H)`, or this rank's tokens `(t, H)` with `sequence_parallel`.
    Returns:
        `(T, H)`.
    """
    if tensor.size == 1:
        return x
    return _GatherTokens.apply(x, tensor, True) if sequence_parallel else _Copy.apply(x, tensor)


def leave_region(x: Tensor, tensor: Axis, *, sequence_parallel: bool = False) -> Tensor:
    """What becomes of a row-parallel product: the sum over ranks, whole or this rank's tokens of it.

    Args:
        x: `(T, H)`, one addend per rank; it is overwritten.
    Returns:
        `(T, H)`, or `(t, H)` with `sequence_parallel`.
    Raises:
        LayoutError: With `sequence_parallel`, the tokens do not divide by the axis' size.
    """
    if tensor.size == 1:
        return x
    if not sequence_parallel:
        return _Sum.apply(x, tensor)
    share(len(x), tensor, what="tokens of a micro-batch")
    return _ScatterSum.apply(x, tensor)


def split_tokens(x: Tensor, tensor: Axis) -> Tensor:
    """This rank's tokens `(t, …)` of activations that are whole on every rank, `(T, …)`."""
    if tensor.size == 1:
        return x
    share(len(x), tensor, what="tokens of a micro-batch")
    return _SplitTokens.apply(x, tensor)


def gather_tokens(x: Tensor, tensor: Axis) -> Tensor:
    """All tokens `(T, …)` from every rank's `(t, …)`, for what every rank then computes alike."""
    return x if tensor.size == 1 else _GatherTokens.apply(x, tensor, False)


def gather_last_dim(x: Tensor, tensor: Axis, *, length: int) -> Tensor:
    """Join the last dimension over the axis; every rank then computes alike with the whole.

    Args:
        x: `(T, w)`, w by `layout.shards.bounds`: slices may differ in length.
        length: Of the whole.
    Returns:
        `(T, length)`.
    """
    return x if tensor.size == 1 else _GatherLastDim.apply(x, tensor, length)


def every_rank(x: Tensor, tensor: Axis) -> Tensor:
    """What each rank has, `(size, …)`, without a gradient; for a few numbers a token."""
    return _gathered(x[None], tensor) if tensor.size > 1 else x[None]


class _Copy(Function):
    """Identity forward, sum of gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _summed(grad, ctx.tensor), None


class _Sum(Function):
    """Sum forward, in place: the product that is summed is nobody else's. Identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=tensor.group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _GatherTokens(Function):
    """All tokens forward; backward this rank's tokens of the gradient, summed over ranks where they differ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis, sums: bool) -> Tensor:
        ctx.tensor, ctx.sums = tensor, sums
        return _gathered(x, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        mine = _scattered(grad, ctx.tensor) if ctx.sums else _own_tokens(grad, ctx.tensor)
        return mine, None, None


class _ScatterSum(Function):
    """This rank's tokens of the sum forward; all tokens of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return _scattered(x, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gathered(grad, ctx.tensor), None


class _SplitTokens(Function):
    """This rank's tokens forward; all tokens of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        # a copy: a slice would keep the whole alive
        return _own_tokens(x, tensor).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _gathered(grad, ctx.tensor), None


class _GatherLastDim(Function):
    """The whole last dimension forward, this rank's slice of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis, length: int) -> Tensor:
        ctx.own = bounds(length, size=tensor.size, rank=tensor.rank)
        widths = [
            stop - start for start, stop in (bounds(length, size=tensor.size, rank=r) for r in range(tensor.size))
        ]
        widest = max(widths)
        padded = x if x.shape[-1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[-1]))
        pieces = _gathered(padded, tensor).unflatten(0, (tensor.size, -1))
        return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        start, stop = ctx.own
        return grad[..., start:stop].contiguous(), None, None


def _summed(x: Tensor, tensor: Axis) -> Tensor:
    # a copy: autograd may hand the same gradient to another branch
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=tensor.group)
    return total


def _gathered(x: Tensor, tensor: Axis) -> Tensor:
    whole = x.new_empty((tensor.size * x.shape[0], *x.shape[1:]))
    _all_gather_single(whole, x.contiguous(), group=tensor.group)
    return whole


def _scattered(x: Tensor, tensor: Axis) -> Tensor:
    mine = x.new_empty((x.shape[0] // tensor.size, *x.shape[1:]))
    _reduce_scatter_single(mine, x.contiguous(), group=tensor.group)
    return mine


def _own_tokens(x: Tensor, tensor: Axis) -> Tensor:
    count = x.shape[0] // tensor.size
    return x.narrow(0, tensor.rank * count, count)
