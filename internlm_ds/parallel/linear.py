"""Linear layers that are split over the tensor axis: by output (column) or by input (row).

Weights are `(out, in)` as in `torch.nn.Linear`. Values are not drawn here: `model.init` fills every parameter by its
name.

Legend: H input width, F output width; small letters are this rank's share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from internlm_ds.parallel.collectives import (
    copy_to_tensor_ranks,
    gather_from_tensor_ranks,
    require_single,
    share,
    sum_over_tensor_ranks,
)
from internlm_ds.parallel.context import Axis


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W, the outputs, split over tensor ranks: `(T, H) -> (T, f)`.

    Args:
        in_features, out_features: Whole sizes.
        tensor: The axis.
        bias: Whether there is one, split like the outputs.
        gather_output: Every rank gets all outputs, `(T, F)`.
        weight_scale: Share of the weight that gets a gradient (`embed_grad_scale`); the value is unchanged.
        dtype: Of the parameters, and what the input is cast to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = True,
        gather_output: bool = False,
        weight_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        require_single(tensor)
        self.tensor, self.gather_output, self.weight_scale = tensor, gather_output, weight_scale
        rows = share(out_features, tensor, what="output width")
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_tensor_ranks(x.to(self.weight.dtype), self.tensor)
        y = linear(x, scale_gradient(self.weight, self.weight_scale), self.bias)
        return gather_from_tensor_ranks(y, self.tensor) if self.gather_output else y


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the columns of W, the inputs, split over tensor ranks: `(T, h) -> (T, F)`, summed over ranks.

    The bias is added once, after the sum; tensor rank 0 owns it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        require_single(tensor)
        self.tensor = tensor
        columns = share(in_features, tensor, what="input width")
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=dtype))
        owns_bias = bias and tensor.rank == 0
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if owns_bias else None

    def forward(self, x: Tensor) -> Tensor:
        # the bias joins before the sum because only one rank has it
        return sum_over_tensor_ranks(linear(x.to(self.weight.dtype), self.weight, self.bias), self.tensor)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """The same value with its gradient multiplied by `scale` (GLM-130B, section 3.3: embedding gradient shrink)."""
    return x if scale == 1 else scale * x + (1 - scale) * x.detach()
