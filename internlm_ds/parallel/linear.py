"""Linear layers that are split over the tensor axis: by output (column) or by input (row).

Weights are `(out, in)` as in `torch.nn.Linear`. Values are not drawn here: `model.init` fills every parameter by its
name.

Legend: T tokens, t this rank's tokens; H input width, F output width; small letters are this rank's share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.collectives import enter_region, gather_last_dim, leave_region, share
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.deferred import WeightGrads, linear


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the rows of W, the outputs, split over tensor ranks: `(T, H) -> (T, f)`.

    Args:
        in_features, out_features: Whole sizes.
        tensor: The axis.
        bias: Whether there is one, split like the outputs.
        gather_output: Every rank gets all outputs, `(T, F)`.
        enters: The layer enters the tensor region itself; False when its input did already, once for several layers.
        sequence_parallel: What comes in is this rank's tokens, `(t, H)`.
        uneven: Ranks may hold slices of different lengths: a vocabulary need not divide.
        weight_scale: Share of the weight that gets a gradient (`embed_grad_scale`); the value is unchanged.
        dtype: Of the parameters, and what the input is cast to.
    Raises:
        LayoutError: The outputs do not divide over the axis.
    """

    # given by the engine when its schedule puts the gradients of weights off
    weight_grads: WeightGrads | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = True,
        gather_output: bool = False,
        enters: bool = True,
        sequence_parallel: bool = False,
        uneven: bool = False,
        weight_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tensor, self.out_features = tensor, out_features
        self.gather_output, self.weight_scale = gather_output, weight_scale
        self.enters, self.sequence_parallel = enters, sequence_parallel
        if uneven:
            start, stop = bounds(out_features, size=tensor.size, rank=tensor.rank)
            rows = stop - start
        else:
            rows = share(out_features, tensor, what="output width")
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.enters:
            x = enter_region(x, self.tensor, sequence_parallel=self.sequence_parallel)
        y = linear(x, self._weight(), self.bias, self.weight_grads)
        return gather_last_dim(y, self.tensor, length=self.out_features) if self.gather_output else y

    def _weight(self) -> Tensor:
        """The matrix as it is used."""
        return scale_gradient(self.weight, self.weight_scale)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the columns of W, the inputs, split over tensor ranks: `(T, h) -> (T, F)`, summed over ranks.

    The bias is added once; tensor rank 0 owns it. With `sequence_parallel` a rank gets its tokens of the sum, `(t, F)`.

    Raises:
        LayoutError: The inputs do not divide over the axis.
    """

    # given by the engine when its schedule puts the gradients of weights off
    weight_grads: WeightGrads | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tensor: Axis,
        bias: bool = True,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tensor, self.sequence_parallel = tensor, sequence_parallel
        columns = share(in_features, tensor, what="input width")
        self.weight = nn.Parameter(torch.empty(out_features, columns, dtype=dtype))
        owns_bias = bias and tensor.rank == 0
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if owns_bias else None

    def forward(self, x: Tensor) -> Tensor:
        # the bias joins before the sum because only one rank has it; its gradient is over all tokens, split or not
        y = linear(x.to(self.weight.dtype), self.weight, self.bias, self.weight_grads)
        return leave_region(y, self.tensor, sequence_parallel=self.sequence_parallel)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """The same value with its gradient multiplied by `scale` (GLM-130B, section 3.3: embedding gradient shrink)."""
    return x if scale == 1 else scale * x + (1 - scale) * x.detach()
