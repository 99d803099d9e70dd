"""Multi-head self-attention of InternLM v1: one packed projection `Wqkv`, rotary, packed causal attention, `out_proj`.

How attention is computed comes from outside as a function (`attention.select`); the key/value cache belongs to
`generate`.

Legend: T tokens, H hidden, N heads, D head width; n = N / tensor.size. With `sequence_parallel` a rank gets and gives
its tokens only; attention itself sees all of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from internlm_ds.attention import sdpa
from internlm_ds.attention.segments import Segments
from internlm_ds.attention.select import Attend
from internlm_ds.model.rotary import Rotary, rotate
from internlm_ds.parallel.collectives import share
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import ColumnParallelLinear, RowParallelLinear


class KeyValueCache(Protocol):
    """What a layer remembers of one sequence: rotated keys, and values; `length` tokens of each."""

    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `(t, n, D)` twice and return everything so far, `(s, n, D)` twice."""
        ...


class SelfAttention(nn.Module):
    """`(T, H) -> (T, H)`."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        rotary: Rotary,
        attend: Attend,
        tensor: Axis,
        sequence_parallel: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.num_local_heads = share(num_heads, tensor, what="model.num_attention_heads")
        self.rotary, self.attend, self.dropout = rotary, attend, dropout
        common = {"tensor": tensor, "sequence_parallel": sequence_parallel, "dtype": dtype}
        self.Wqkv = ColumnParallelLinear(hidden_size, 3 * hidden_size, **common)
        self.out_proj = RowParallelLinear(hidden_size, hidden_size, **common)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """All tokens of a micro-batch; each segment attends to itself only."""
        qkv = self._project(x)
        q, k = rotate(qkv[:, :2], self.rotary.tables_of(segments, qkv.dtype)).unbind(dim=1)
        context = self.attend(q, k, qkv[:, 2], segments, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(context.flatten(1))

    def extend(self, x: Tensor, cache: KeyValueCache) -> Tensor:
        """The next t tokens of one sequence whose earlier tokens lie in `cache`: `(t, H) -> (t, H)`."""
        qkv, stop = self._project(x), cache.length + len(x)
        positions = torch.arange(cache.length, stop, device=x.device)
        q, k = rotate(qkv[:, :2], self.rotary.tables(positions, stop, qkv.dtype)).unbind(dim=1)
        return self.out_proj(sdpa.extend(q, *cache.append(k, qkv[:, 2])).flatten(1))

    def _project(self, x: Tensor) -> Tensor:
        """`(T, H) -> (T, 3, n, D)`; a rank's rows of Wqkv are its queries, then its keys, then its values."""
        return self.Wqkv(x).unflatten(-1, (3, self.num_local_heads, -1))
