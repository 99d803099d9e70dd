"""Sharded equals whole: one layer on several ranks against the same layer on one, outputs and gradients.

Called by every rank of an axis (`testing.ranks.run_ranks`). Shipped, because people who bring their own model family
test their layers the same way. Which part of a parameter a rank holds is the blueprint's word (`arch.spec.ParamSpec`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.layout.shards import bounds, holds, shard_of
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.shards import take


def assert_sharded_equals_whole(
    build: Callable[[Axis], nn.Module],
    specs: Sequence[ParamSpec],
    *,
    axis: Axis,
    x: Tensor,
    input_dim: int | None = None,
    output_dim: int | None = None,
    partial: Sequence[str] = (),
    tolerance: float = 1e-10,
) -> None:
    """Raise `AssertionError` unless the layer on `axis` computes what it does on one rank.

    Args:
        build: Makes the layer over an axis; called for this axis and for one of size 1.
        specs: Its parameters, by their names inside the layer.
        axis: The axis to test; the same on all ranks but for `rank`.
        x: The whole input, equal on all ranks; integers (tokens) get no gradient.
        input_dim: Dimension of x that ranks hold a slice of; None: each has all of it.
        output_dim: The same of the output.
        partial: Parameters whose gradients are to be summed over ranks before they are compared: those that a rank sees
            its own tokens with (norms under sequence parallelism).
        tolerance: Absolute and relative.
    """
    whole, local = build(Axis.single(axis.name)), build(axis)
    by_name = {spec.name: spec for spec in specs}
    _fill(whole)
    with torch.no_grad():
        values = dict(whole.named_parameters())
        held = {name for name, spec in by_name.items() if holds(spec, rank=axis.rank)}
        assert {name for name, _ in local.named_parameters()} == held, f"parameters are not {sorted(held)}"
        for name, parameter in local.named_parameters():
            parameter.copy_(_part(values[name], by_name[name], axis))
    expected, x_grad, grads = _run(whole, x, None)
    found, local_x_grad, local_grads = _run(
        local, _slice(x, input_dim, axis), lambda y: _slice(_direction(expected), output_dim, axis)
    )
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(found, _slice(expected, output_dim, axis), **close, msg=lambda m: f"output: {m}")
    if x_grad is not None:
        torch.testing.assert_close(
            local_x_grad, _slice(x_grad, input_dim, axis), **close, msg=lambda m: f"gradient of the input: {m}"
        )
    for name, grad in local_grads.items():
        if name in partial:
            torch.distributed.all_reduce(grad, group=axis.group)
        expected_grad = _part(grads[name], by_name[name], axis)
        torch.testing.assert_close(grad, expected_grad, **close, msg=lambda m, n=name: f"gradient of {n}: {m}")


def _part(whole: Tensor, spec: ParamSpec, axis: Axis) -> Tensor:
    return take(whole, shard_of(spec, size=axis.size, rank=axis.rank))


def _fill(module: nn.Module) -> None:
    for i, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def _direction(y: Tensor) -> Tensor:
    """A fixed cotangent of the whole output."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=y.dtype)


def _slice(x: Tensor, dim: int | None, axis: Axis) -> Tensor:
    if dim is None:
        return x
    start, stop = bounds(x.shape[dim], size=axis.size, rank=axis.rank)
    return x.narrow(dim, start, stop - start)


def _run(
    module: nn.Module, x: Tensor, cotangent: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = module(x)
    y.backward(_direction(y) if cotangent is None else cotangent(y))
    return y.detach(), x.grad, {name: parameter.grad for name, parameter in module.named_parameters()}
