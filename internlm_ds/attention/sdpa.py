"""Packed attention by PyTorch's own scaled_dot_product_attention: any device, any float dtype.

One batched call when all segments are equally long (unpacked data, dummy data). Otherwise one call per segment where
segments are long or few, and else one call per batch of segments of similar length, padded at their ends: a causal
query never sees what comes after it, so padding needs no mask. A (T, T) mask is never built: with 2 048 tokens it took
four to thirty times as long. Also attention over a key/value cache, for generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internlm_ds.attention.segments import Segments

SHORT_ON_CPU = 16
"""Tokens of an average segment up to which batches are faster on a CPU, where a call then costs more than its
arithmetic: at 8 they take two thirds of the time, at 16 as much, at 32 a quarter more (benchmarks/attention.py)."""
FEW_ON_DEVICE = 8
"""Segments up to which a device gets one call each; every call costs the host more than a short segment the device."""


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """As `attention.reference.attend`, computed by SDPA: `(T, N, D)`, `(T, G, D)` twice -> `(T, N, D)`."""
    length = segments.equal_length
    if length is not None:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        return _causal(q, k, v, dropout).transpose(1, 2).flatten(0, 1)
    return (in_batches if _batches_pay(segments, q.device) else one_by_one)(q, k, v, segments, dropout=dropout)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """`attend` by one call per segment.

    The tensors are split once: the backward of a slice would fill a whole tensor with zeros for each segment.
    """
    parts = [
        _causal(*(x.transpose(0, 1)[None] for x in part), dropout)[0].transpose(0, 1)
        for part in zip(*(x.split(segments.lengths) for x in (q, k, v)))
    ]
    return torch.cat(parts)


def in_batches(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """`attend` by one call per batch of segments of similar length; at most twice the tokens, however they are."""
    batches, back = segments.shared("sdpa batches", lambda: _batches(segments, q.device))
    parts = []
    for batch in batches:
        padded = (x.index_select(0, batch.rows).unflatten(0, (batch.count, -1)).transpose(1, 2) for x in (q, k, v))
        parts.append(_causal(*padded, dropout).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).index_select(0, back)


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


@dataclass(frozen=True)
class _Batch:
    """Segments of one call: how many, and int64 `(count · longest,)`, the token that each padded place holds."""

    count: int
    rows: Tensor


def _batches_pay(segments: Segments, device: torch.device) -> bool:
    count = len(segments.lengths)
    if device.type == "cpu":
        return segments.num_tokens <= SHORT_ON_CPU * count
    return count > FEW_ON_DEVICE


def _batches(segments: Segments, device: torch.device) -> tuple[list[_Batch], Tensor]:
    """The batches, and for each token its place in their joint output, int64 `(T,)`."""
    lengths = torch.tensor(segments.lengths)
    starts = torch.tensor(segments.borders[:-1])
    batches, back, offset = [], torch.empty(segments.num_tokens, dtype=torch.int64), 0
    for longest, members in _similar(segments.lengths):
        of, first = lengths[members, None], starts[members, None]
        place = torch.arange(longest)
        rows = (first + torch.minimum(place, of - 1)).flatten()  # padding repeats the last token
        real = (place < of).flatten().nonzero()[:, 0]
        back[rows[real]] = real + offset
        offset += len(rows)
        batches.append(_Batch(len(members), rows.to(device, non_blocking=True)))
    return batches, back.to(device, non_blocking=True)


def _similar(lengths: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """Numbers of the segments in groups whose shortest is longer than half the longest; with that longest."""
    groups: list[tuple[int, list[int]]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or 2 * lengths[number] <= groups[-1][0]:
            groups.append((lengths[number], []))
        groups[-1][1].append(number)
    return groups


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """`(B, N, L, D)`, `(B, G, L, D)` twice -> `(B, N, L, D)`; SDPA's default scale is 1/√D."""
    return scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
