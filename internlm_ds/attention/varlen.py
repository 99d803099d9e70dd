"""Packed attention by `torch.nn.attention.varlen`: the flash kernels that torch itself brings, nothing to install.

CUDA, half precision, no dropout. torch 2.9 lacks the module; 2.10 takes `is_causal`, later versions a window, and
grouped heads only from 2.12 on: the function's signature says which. Its backward gives the same bits each time under
`torch.use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from internlm_ds.attention import kernels
from internlm_ds.attention.kernels import Attend, Setting, Unfit
from internlm_ds.attention.segments import Segments

MODULE = "torch.nn.attention.varlen"
_MULTIPLE = 8  # the bare kernel pads no heads


def find(setting: Setting) -> Attend:
    """The backend, when it can run here.

    Raises:
        Unfit: It cannot, and why.
    """
    name = "torch's varlen attention"
    kernels.check_flash(name, setting)
    if setting.head_dim % _MULTIPLE:
        raise Unfit(f"{name} takes heads of a multiple of {_MULTIPLE}, these have {setting.head_dim}")
    if setting.dropout:
        raise Unfit(f"{name} has no dropout (model.attn_drop_rate)")
    try:
        function = importlib.import_module(MODULE).varlen_attn
    except (ImportError, AttributeError):
        raise Unfit(f"torch {torch.__version__} has no varlen attention; 2.10 has") from None
    attend = bind(function)
    try:
        kernels.trial(attend, setting)
    except Exception as error:  # a torch that was built without flash kernels, or not for this device
        raise Unfit(f"{name} does not work: {kernels.on_one_line(error)}") from error
    return attend


def bind(function: Callable[..., Any]) -> Attend:
    """`attend` over a `varlen_attn` of any version."""
    names = inspect.signature(function).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    groups = "enable_gqa" in names

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
        if dropout:
            raise ValueError("torch's varlen attention has no dropout")
        options = dict(causal)
        shared = q.shape[1] // k.shape[1]
        if shared > 1 and groups:
            options["enable_gqa"] = True
        elif shared > 1:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        borders, longest = segments.cu_seqlens, segments.max_seqlen
        return function(q, k, v, borders, borders, longest, longest, **options)

    return attend
