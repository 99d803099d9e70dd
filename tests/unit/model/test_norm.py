"""Norms compute in fp32 and return the model's dtype."""

import pytest
import torch

from internlm_ds.model.block import LayerNormEntry, RmsNormEntry
from internlm_ds.model.norm import LayerNorm, RmsNorm, build_norm

HALF = [torch.float16, torch.bfloat16]


def norm(kind="rmsnorm", dtype=torch.float32, weight_dtype=None):
    module = build_norm(kind, 16, eps=1e-5, dtype=dtype, weight_dtype=weight_dtype)
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def test_rmsnorm_formula():
    module, x = norm(), torch.randn(5, 16)
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
    torch.testing.assert_close(module(x), expected.float())


def test_layernorm_formula():
    module, x = norm("layernorm"), torch.randn(5, 16)
    expected = torch.nn.functional.layer_norm(x, (16,), module.weight, module.bias, 1e-5)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_output_dtype_is_the_models(kind, dtype):
    assert norm(kind, dtype)(torch.randn(5, 16)).dtype == dtype
    assert norm(kind, dtype, torch.float32)(torch.randn(5, 16).to(dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_rmsnorm_rounds_before_the_product_with_half_weights(dtype):
    module, x = norm(dtype=dtype), torch.randn(5, 16)
    normalised = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(module(x), normalised.to(dtype) * module.weight)


def test_fp64_model_still_normalises_in_fp32():
    module, x = norm(dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    rounded = x.float()
    expected = (rounded * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-5)) * module.weight
    assert torch.equal(module(x), expected)


def test_large_half_values_do_not_overflow():
    assert norm(dtype=torch.float16)(torch.full((1, 16), 6e4, dtype=torch.float16)).isfinite().all()


def test_any_other_type_is_a_layernorm():
    assert isinstance(norm("rmsnorm"), RmsNorm)
    assert isinstance(norm("layernorm"), LayerNorm)
    assert isinstance(build_norm("ln", 4, eps=1e-5, dtype=torch.float32), LayerNorm)
    pair = (RmsNormEntry, LayerNormEntry)
    assert isinstance(build_norm("ln", 4, eps=1e-5, dtype=torch.float32, classes=pair), LayerNormEntry)
