"""Rotary position embedding (Su et al., RoFormer, eq. 34), with dynamic NTK scaling of its base.

Pairs are (j, j + D/2), the "NeoX" order, or neighbours (2j, 2j + 1), the order of the paper and of Meta's Llama. Angles
are computed in fp32; cosines and sines are rounded to the dtype of the activations; the rotation itself is done in fp32
(fp64 for fp64 activations).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internlm_ds.attention.segments import Segments

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rotary:
    """The angles of one model.

    Attributes:
        head_dim: D.
        base: `rope_base`.
        max_position_embeddings: Longest sequence without scaling; only looked at with `dynamic_ntk`.
        dynamic_ntk: Larger base for longer sequences.
        neighbours: Pairs are (2j, 2j + 1).
    """

    head_dim: int
    base: float = 10000.0
    max_position_embeddings: int = 2048
    dynamic_ntk: bool = False
    neighbours: bool = False

    def rotate(self, x: Tensor, tables: Tables) -> Tensor:
        """Rotate every head of x `(T, …, D)` by its token's angles; see `rotate`."""
        return rotate(x, tables, neighbours=self.neighbours)

    def tables_of(self, segments: Segments, dtype: torch.dtype) -> Tables:
        """Cosines and sines `(T, D/2)` for the tokens of a micro-batch; made once for all layers of a stage."""
        return segments.shared(
            ("rotary", self, dtype), lambda: self.tables(segments.positions, segments.max_seqlen, dtype)
        )

    def tables(self, positions: Tensor, longest: int, dtype: torch.dtype) -> Tables:
        """Cosines and sines `(T, D/2)` in `dtype` of positions `(T,)`, the largest of which is `longest` - 1."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        angles = torch.outer(positions.float(), 1.0 / self.base_for(longest) ** exponents)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def base_for(self, longest: int) -> float:
        """The base for sequences of up to `longest` tokens: b · (n/m)^(D/(D-2)) once n exceeds m, else b.

        >>> Rotary(128, dynamic_ntk=True, max_position_embeddings=2048).base_for(2048)
        10000.0
        """
        if not self.dynamic_ntk or longest <= self.max_position_embeddings:
            return self.base
        return self.base * (longest / self.max_position_embeddings) ** (self.head_dim / (self.head_dim - 2))


def rotate(x: Tensor, tables: Tables, *, neighbours: bool = False) -> Tensor:
    """Rotate every head of x `(T, …, D)` by its token's angles `(T, D/2)`: a' = a cos - b sin, b' = a sin + b cos.

    Pairs (a, b) come out as halves of the head, also where they went in as neighbours: queries and keys are treated
    alike, and their products do not depend on the order.
    """
    if neighbours:
        return rotate_plain(x, tables, neighbours=True)
    # both halves at once: (a, b)·(cos, cos) + (b, a)·(-sin, sin), three passes instead of nine
    wide, (cos, sin) = _widened(x, tables)
    both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return torch.addcmul(wide * both[0], wide.roll(wide.shape[-1] // 2, dims=-1), both[1]).to(x.dtype)


def rotate_plain(x: Tensor, tables: Tables, *, neighbours: bool = False) -> Tensor:
    """What `rotate` computes, pair by pair as the formula says: its oracle, and the way for neighbours."""
    wide, (cos, sin) = _widened(x, tables)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if neighbours else wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _widened(x: Tensor, tables: Tables) -> tuple[Tensor, Tables]:
    """x and tables in the dtype that is computed in, tables as `(T, 1, …, D/2)`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    heads = (1,) * (x.dim() - 2)
    cos, sin = (t.to(compute).view(t.shape[0], *heads, t.shape[1]) for t in tables)
    return x.to(compute), (cos, sin)
