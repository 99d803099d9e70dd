"""RMSNorm and LayerNorm that compute in fp32 whatever the model's dtype.

The input is the residual stream; it is cast to fp32 first, as InternLM v1 does, also in a float64 model. The output
has the model's dtype even when the weights are kept in fp32 (`use_fp32_norm`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        if self.weight.dtype in HALF:
            x = x.to(self.weight.dtype)
        return (x * self.weight).to(self.out_dtype)


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
