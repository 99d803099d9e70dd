"""RMSNorm and LayerNorm that compute in fp32 whatever the model's dtype.

RMSNorm keeps its input and one number a token for the backward pass and computes the rest again; `rms_norm_plain` is
the same in plain torch, which keeps fp32 copies, and the oracle of its tests.

The input is the residual stream; it is cast to fp32 first, as InternLM v1 does, also in a float64 model. The output
has the model's dtype even when the weights are kept in fp32 (`use_fp32_norm`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import layer_norm

HALF = (torch.float16, torch.bfloat16)


class RmsNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight, `(T, H) -> (T, H)` (Zhang and Sennrich, RMSNorm, eq. 4).

    The normalised value is rounded to the weight's dtype before the product when that is half precision.
    """

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype, weight_dtype: torch.dtype):
        super().__init__()
        self.eps, self.out_dtype = eps, dtype
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=weight_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.weight, self.eps, self.out_dtype)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """What `RmsNorm` computes, differentiated by autograd."""
    x = x.float()
    return (_rounded(x * _inverse_rms(x, eps), weight) * weight).to(out_dtype)


class _RmsNorm(Function):
    """n = x·r with r = rsqrt(mean(x²) + eps); the gradient of x is r·(g - n·mean(g·n)), g that of n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        wide = x.float()
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (_rounded(wide * inverse, weight) * weight).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        normalised = x.float() * inverse
        factor = _rounded(normalised, weight)
        # the product with the weight was made in this dtype
        grad = grad.to(torch.promote_types(factor.dtype, weight.dtype))
        of_weight = (grad * factor).flatten(0, -2).sum(dim=0).to(weight.dtype)
        # through the rounding, back to fp32
        grad = (grad * weight).to(factor.dtype).float()
        along = (grad * normalised).mean(dim=-1, keepdim=True)
        return torch.addcmul(grad, normalised, along, value=-1).mul_(inverse).to(x.dtype), of_weight, None, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps)


def _rounded(x: Tensor, weight: Tensor) -> Tensor:
    """To the weight's dtype if that is half precision."""
    return x.to(weight.dtype) if weight.dtype in HALF else x


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias, `(T, H) -> (T, H)`, all of it in fp32."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype, weight_dtype: torch.dtype):
        super().__init__()
        self.eps, self.out_dtype = eps, dtype
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=weight_dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=weight_dtype))

    def forward(self, x: Tensor) -> Tensor:
        normalised = layer_norm(x.float(), self.weight.shape, eps=self.eps)
        return (normalised * self.weight + self.bias).to(self.out_dtype)


def build_norm(
    norm_type: str,
    hidden_size: int,
    *,
    eps: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    classes: tuple[type[RmsNorm], type[LayerNorm]] | None = None,
) -> nn.Module:
    """RMSNorm for `rmsnorm`, LayerNorm for every other `norm_type`.

    Args:
        norm_type: As in the configuration.
        hidden_size: H.
        eps: `layer_norm_epsilon`.
        dtype: Of the output.
        weight_dtype: Of the parameters; `dtype` when None.
        classes: Sub-classes of the two to build instead.
    """
    rms, layer = classes or (RmsNorm, LayerNorm)
    norm = rms if norm_type == "rmsnorm" else layer
    return norm(hidden_size, eps=eps, dtype=dtype, weight_dtype=weight_dtype or dtype)
