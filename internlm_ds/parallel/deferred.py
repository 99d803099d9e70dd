"""A linear product whose weight gradient can wait: zero-bubble schedules compute it when the pipeline would idle.

The engine hands a `WeightGrads` to the layers (attribute `weight_grads`), takes what a backward pass left there, and
computes it when its schedule says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Pending(NamedTuple):
    """A weight gradient still to be computed: `grad_outputᵀ · x`."""

    weight: nn.Parameter
    x: Tensor
    grad_output: Tensor


class WeightGrads:
    """What backward passes put off."""

    def __init__(self) -> None:
        self._pending: list[Pending] = []

    def put(self, pending: Pending) -> None:
        self._pending.append(pending)

    def take(self) -> list[Pending]:
        """Everything since the last call."""
        taken, self._pending = self._pending, []
        return taken


@torch.no_grad()
def accumulate(pending: list[Pending]) -> None:
    """Add the gradients to `weight.grad`, in the order in which they were put off."""
    while pending:
        weight, x, grad_output = pending.pop(0)
        grad = _weight_gradient(grad_output, x)
        if weight.grad is None:
            weight.grad = grad
        else:
            weight.grad.add_(grad)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGrads | None = None) -> Tensor:
    """`torch.nn.functional.linear`; with `later` the gradient of a weight that is a parameter is put off."""
    if later is None or not weight.is_leaf:
        return functional.linear(x, weight, bias)
    return _Deferred.apply(x, weight, bias, later)


class _Deferred(torch.autograd.Function):
    """Only the gradients of input and bias, which are cheap or awaited, are computed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, later: WeightGrads) -> Tensor:
        ctx.save_for_backward(x)
        # beside the saved tensors: recomputation would give a copy back, and the gradient must reach the parameter
        ctx.weight, ctx.later, ctx.has_bias = weight, later, bias is not None
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        ctx.later.put(Pending(ctx.weight, x, grad_output))
        grad_x = grad_output @ ctx.weight if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_output.flatten(0, -2).sum(0) if ctx.has_bias else None, None


def _weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    return grad_output.flatten(0, -2).t() @ x.flatten(0, -2)
