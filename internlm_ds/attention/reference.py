"""The slow obvious attention: the whole (T, T) table of scores, masked. The oracle of every other backend's tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from internlm_ds.attention.segments import Segments


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √D) v, causal, each segment on its own.

    Args:
        q: `(T, N, D)`.
        k, v: `(T, G, D)`; N is a multiple of G.
        segments: Borders; tokens of different segments do not see each other.
        dropout: Probability that an attention weight is dropped; 0 outside training.
    Returns:
        `(T, N, D)` in the dtype of `v`; scores and softmax at least in fp32.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qnd,knd->nqk", q.to(compute), k.to(compute)) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible(segments, q.device), float("-inf")).softmax(dim=-1)
    weights = torch.nn.functional.dropout(weights, dropout)
    return torch.einsum("nqk,knd->qnd", weights, v.to(compute)).to(v.dtype)


def visible(segments: Segments, device: torch.device) -> Tensor:
    """bool `(T, T)`: row q may look at column k when both lie in one segment and k is not later than q."""
    lengths = torch.tensor(segments.lengths, device=device)
    number = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    return (number[:, None] == number[None, :]).tril()
