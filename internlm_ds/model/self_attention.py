"""Multi-head self-attention: projection, rotary, packed causal attention, output matrix.

Three ways to make queries, keys and values, with the parameter names of their families: `PackedAttention` (InternLM
v1), `GroupedAttention` (InternLM2, several query heads for one key/value head), `SeparateAttention` (Llama). How
attention is computed comes from outside as a function (`attention.select`); the cache belongs to `generate`.

Legend: T tokens, H hidden, N heads, G key/value heads, D head width, m = N/G query heads for each key/value head;
n, g: N, G / tensor.size. With `sequence_parallel` a rank gets and gives its tokens only; attention itself sees all.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from internlm_ds.attention import sdpa
from internlm_ds.attention.kernels import Attend
from internlm_ds.attention.segments import Segments
from internlm_ds.model.rotary import Rotary, Tables
from internlm_ds.parallel.collectives import enter_region, share
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear


class KeyValueCache(Protocol):
    """What a layer remembers of one sequence: rotated keys, and values; `length` tokens of each."""

    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(t, g, D)` twice and return everything so far, `(s, g, D)` twice."""
        ...


class SelfAttention(nn.Module):
    """`(T, H) -> (T, H)`; what the three have in common.

    Args:
        num_kv_heads: G; N is a multiple of it, and tensor ranks divide it.
        bias: Projections and output have biases.
        dropout: Of attention weights, in training.
    Raises:
        LayoutError: The heads do not divide over the axis.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        rotary: Rotary,
        attend: Attend,
        tensor: Axis,
        bias: bool = True,
        sequence_parallel: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.num_local_heads = share(num_heads, tensor, what="model.num_attention_heads")
        self.num_local_groups = share(num_kv_heads, tensor, what="model.num_kv_attention_heads")
        self.rotary, self.attend, self.dropout = rotary, attend, dropout
        self.tensor, self.sequence_parallel = tensor, sequence_parallel
        common = {"tensor": tensor, "bias": bias, "dtype": dtype}
        self._build(hidden_size, num_heads * rotary.head_dim, num_kv_heads * rotary.head_dim, common)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """All tokens of a micro-batch; each segment attends to itself only."""
        q, k, v = self.project(x, lambda dtype: self.rotary.tables_of(segments, dtype))
        context = self.attend(q, k, v, segments, dropout=self.dropout if self.training else 0.0)
        return self.output(context.flatten(1))

    def extend(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """The next t tokens of one sequence whose earlier tokens lie in `cache`: `(t, H) -> (t, H)`."""
        stop = cache.length + len(x)
        positions = torch.arange(cache.length, stop, device=x.device)
        q, k, v = self.project(x, lambda dtype: self.rotary.tables(positions, stop, dtype))
        return self.output(sdpa.extend(q, *cache.append(k, v)).flatten(1))

    def _build(self, hidden_size: int, q_width: int, kv_width: int, common: dict) -> None:
        """Make the matrices, under the family's names."""
        raise NotImplementedError

    def project(self, x: Tensor, tables: TablesFor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: `(T, n, D)`, `(T, g, D)` twice."""
        raise NotImplementedError

    def output(self, context: Tensor) -> Tensor:
        """`(T, n·D) -> (T, H)`."""
        raise NotImplementedError


class TablesFor(Protocol):
    """Rotary tables of the tokens at hand, in a dtype."""

    def __call__(self, dtype: torch.dtype) -> Tables: ...


class PackedAttention(SelfAttention):
    """InternLM v1: `Wqkv`, whose rows (a rank's, too) are queries, then keys, then values; `out_proj`."""

    def _build(self, hidden_size: int, q_width: int, kv_width: int, common: dict) -> None:
        parallel = {**common, "sequence_parallel": self.sequence_parallel}
        self.Wqkv = ColumnParallelLinear(hidden_size, q_width + 2 * kv_width, **parallel)
        self.out_proj = RowParallelLinear(q_width, hidden_size, **parallel)

    def project(self, x: Tensor, tables: TablesFor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.Wqkv(x).unflatten(-1, (3, self.num_local_heads, -1))
        q, k = self.rotary.rotate(qkv[:, :2], tables(qkv.dtype)).unbind(dim=1)
        return q, k, qkv[:, 2]

    def output(self, context: Tensor) -> Tensor:
        return self.out_proj(context)


class GroupedAttention(SelfAttention):
    """InternLM2: `wqkv`, whose rows are for every key/value head its m queries, its key, its value; `wo`."""

    def _build(self, hidden_size: int, q_width: int, kv_width: int, common: dict) -> None:
        parallel = {**common, "sequence_parallel": self.sequence_parallel}
        self.wqkv = ColumnParallelLinear(hidden_size, q_width + 2 * kv_width, **parallel)
        self.wo = RowParallelLinear(q_width, hidden_size, **parallel)

    def project(self, x: Tensor, tables: TablesFor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.wqkv(x).unflatten(-1, (self.num_local_groups, -1, self.rotary.head_dim))  # (T, g, m + 2, D)
        made = tables(qkv.dtype)
        q = self.rotary.rotate(qkv[:, :, :-2], made).flatten(1, 2)
        return q, self.rotary.rotate(qkv[:, :, -2], made), qkv[:, :, -1]

    def output(self, context: Tensor) -> Tensor:
        return self.wo(context)


class SeparateAttention(SelfAttention):
    """Llama: `wq`, `wk`, `wv`; `wo`."""

    def _build(self, hidden_size: int, q_width: int, kv_width: int, common: dict) -> None:
        # the input enters once for all three
        self.wq = ColumnParallelLinear(hidden_size, q_width, enters=False, **common)
        self.wk = ColumnParallelLinear(hidden_size, kv_width, enters=False, **common)
        self.wv = ColumnParallelLinear(hidden_size, kv_width, enters=False, **common)
        self.wo = RowParallelLinear(q_width, hidden_size, sequence_parallel=self.sequence_parallel, **common)

    def project(self, x: Tensor, tables: TablesFor) -> tuple[Tensor, Tensor, Tensor]:
        x = enter_region(x.to(self.wq.weight.dtype), self.tensor, sequence_parallel=self.sequence_parallel)
        q, k, v = (matrix(x).unflatten(-1, (-1, self.rotary.head_dim)) for matrix in (self.wq, self.wk, self.wv))
        made = tables(q.dtype)
        return self.rotary.rotate(q, made), self.rotary.rotate(k, made), v

    def output(self, context: Tensor) -> Tensor:
        return self.wo(context)
