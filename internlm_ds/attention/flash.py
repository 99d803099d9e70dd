"""Packed attention by the flash-attn package: CUDA, half precision, all segments in one kernel.

The package is an extra and is imported at the first call; whether it can be used at all, `select` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internlm_ds.attention.segments import Segments
from internlm_ds.errors import MissingExtraError

LARGEST_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """As `attention.reference.attend`, computed by `flash_attn_varlen_func`.

    Raises:
        MissingExtraError: flash-attn is not installed.
    """
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise MissingExtraError("flash-attn", extra="flash", needed_for="attention backend 'flash'") from error
    borders, longest = segments.cu_seqlens, segments.max_seqlen
    return flash_attn_varlen_func(q, k, v, borders, borders, longest, longest, dropout_p=dropout, causal=True)
