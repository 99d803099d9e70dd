"""The two orders of the rows of queries and keys.

A head's rows lie as its rotary pairs do: halves (j and j + d/2, Hugging Face), or neighbours (2j and 2j + 1, Meta and
InternLM's `adapt_hf=False`). Rows are gathered by an index, so exchanging the order keeps every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """How heads lie along the rows of a matrix or bias: groups of `size` heads, of which the first `rotated` turn.

    `wq` and `wk` are groups of one; InternLM2's `wqkv` has groups of m queries, a key and a value, the last not turned.
    """

    head_dim: int
    size: int = 1
    rotated: int = 1

    def to_halves(self, rows: Tensor) -> Tensor:
        """Rows in the order of neighbours -> in the order of halves."""
        return rows[self._index(len(rows), torch.arange(self.head_dim).view(-1, 2).t().flatten())]

    def to_neighbours(self, rows: Tensor) -> Tensor:
        """The inverse of `to_halves`."""
        return rows[self._index(len(rows), torch.arange(self.head_dim).view(2, -1).t().flatten())]

    def _index(self, count: int, within_head: Tensor) -> Tensor:
        heads = torch.arange(count).view(-1, self.size, self.head_dim)
        heads[:, : self.rotated] = heads[:, : self.rotated][:, :, within_head]
        return heads.flatten()
