"""The two feed-forward layers: SwiGLU, and the plain GELU one of `use_swiglu=False`. Neither has biases.

`swiglu` keeps its two inputs for the backward pass and computes silu again; `swiglu_plain` is the same in plain torch,
which keeps a third tensor as wide, and the oracle of its tests.

Parameter names are InternLM's of 2024: `w1` and `w3` read the residual stream, `w2` writes to it.

Legend: H hidden, F width; f = F / tensor.size. With `sequence_parallel` T stands for this rank's tokens outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import gelu, silu

from internlm_ds.parallel.collectives import enter_region
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear


class SwigluMlp(nn.Module):
    """w2(silu(w1 x) · w3 x), `(T, H) -> (T, H)` (Shazeer, GLU Variants Improve Transformer, eq. 6)."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        tensor: Axis,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tensor, self.sequence_parallel = tensor, sequence_parallel
        # the input enters once for both
        column = {"tensor": tensor, "bias": False, "enters": False, "dtype": dtype}
        self.w1 = ColumnParallelLinear(hidden_size, width, **column)
        self.w2 = RowParallelLinear(
            width, hidden_size, tensor=tensor, bias=False, sequence_parallel=sequence_parallel, dtype=dtype
        )
        self.w3 = ColumnParallelLinear(hidden_size, width, **column)

    def forward(self, x: Tensor) -> Tensor:
        x = enter_region(x.to(self.w1.weight.dtype), self.tensor, sequence_parallel=self.sequence_parallel)
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class GeluMlp(nn.Module):
    """fc2(gelu(fc1 x)) with the tanh approximation of GELU, `(T, H) -> (T, H)`."""

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        tensor: Axis,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        common = {"tensor": tensor, "bias": False, "sequence_parallel": sequence_parallel, "dtype": dtype}
        self.fc1 = ColumnParallelLinear(hidden_size, width, **common)
        self.fc2 = RowParallelLinear(width, hidden_size, **common)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, `(T, f)` each."""
    return _Swiglu.apply(gate, up)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` computes, differentiated by autograd."""
    return silu(gate) * up


class _Swiglu(Function):
    """The same operations as autograd's, so that results are equal bit for bit."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        of_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, silu(gate).mul_(grad)
