"""A linear product that puts its weight gradient off gives the same gradients, later."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.deferred import WeightGrads, accumulate, linear
from internlm_ds.parallel.linear import ColumnParallelLinear


def tensors(bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (3, 4), (3,)))
    return x.requires_grad_(), weight.requires_grad_(), b.requires_grad_() if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_the_same_bit_for_bit(bias: bool, recompute: bool):
    wanted = tensors(bias)
    for _ in range(2):
        functional.linear(*wanted).square().sum().backward()
    found, later = tensors(bias), WeightGrads()
    for _ in range(2):
        if recompute:
            y = checkpoint(linear, *found, later, use_reentrant=False)
        else:
            y = linear(*found, later)
        y.square().sum().backward()
    assert found[1].grad is None
    accumulate(later.take())
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.grad.equal(b.grad)
    assert later.take() == []


def test_a_scaled_weight_gets_its_gradient_at_once():
    """With `embed_grad_scale` the product's weight is no parameter but made from one."""
    layer = ColumnParallelLinear(4, 3, tensor=Axis.single("tensor"), weight_scale=0.5)
    torch.nn.init.ones_(layer.weight)
    layer.weight_grads = WeightGrads()
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad.equal(torch.full((3, 4), 1.0))
    assert layer.weight_grads.take() == []


def test_nothing_is_put_off_without_a_place_for_it():
    x, weight, bias = tensors()
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None


def test_an_input_without_gradient_needs_none():
    _, weight, bias = tensors()
    later = WeightGrads()
    linear(torch.ones(5, 4), weight, bias, later).sum().backward()
    accumulate(later.take())
    assert weight.grad.equal(torch.full((3, 4), 5.0))
