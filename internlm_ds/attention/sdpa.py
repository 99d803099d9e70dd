"""Packed attention by PyTorch's own scaled_dot_product_attention: any device, any float dtype.

One batched call when all segments are equally long (unpacked data, dummy data), otherwise one call per segment, so
that no (T, T) mask is ever built. Also attention over a key/value cache, for generation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internlm_ds.attention.segments import Segments


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """As `attention.reference.attend`, computed by SDPA: `(T, N, D)`, `(T, G, D)` twice -> `(T, N, D)`."""
    length = segments.equal_length
    if length is not None:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        return _causal(q, k, v, dropout).transpose(1, 2).flatten(0, 1)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (N, T, D)
    parts = []
    for start, stop in zip(segments.borders, segments.borders[1:]):
        rows = slice(start, stop)
        parts.append(_causal(q[None, :, rows], k[None, :, rows], v[None, :, rows], dropout)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


def extend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last t tokens of one sequence over all its s tokens.

    Args:
        q: `(t, N, D)`, queries of positions s - t … s - 1.
        k, v: `(s, G, D)`.
    Returns:
        `(t, N, D)`.
    """
    t, s = q.shape[0], k.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(diagonal=s - t)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`(B, N, L, D)`, `(B, G, L, D)` twice -> `(B, N, L, D)`; SDPA's default scale is 1/√D."""
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
