"""Which attention backend runs, and the one log line that says so.

`use_flash_attn` of an InternLM configuration is a wish: with it off, plain attention runs; with it on, the best
backend at hand. The backends themselves are next door.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm_ds.attention import flash, reference, sdpa
from internlm_ds.errors import ConfigError

Attend = Callable[..., Tensor]
BACKENDS: dict[str, Attend] = {"flash": flash.attend, "sdpa": sdpa.attend, "reference": reference.attend}


@dataclass(frozen=True)
class Choice:
    """The backend that runs on a device, and why.

    Attributes:
        name: `flash`, `sdpa` or `reference`.
        reason: Empty when the wish was granted as it stands.
    """

    name: str
    reason: str = ""

    @property
    def attend(self) -> Attend:
        return BACKENDS[self.name]

    @property
    def line(self) -> str:
        """What the log says, once."""
        shown = {"flash": "flash-attn", "sdpa": "PyTorch SDPA", "reference": "reference (slow)"}[self.name]
        return f"attention: {shown}" + (f" ({self.reason})" if self.reason else "")


def select(
    use_flash_attn: bool,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    installed: bool | None = None,
) -> Choice:
    """The backend for tensors of this kind.

    Args:
        use_flash_attn: `model.use_flash_attn`.
        device: Where the activations live.
        dtype: Their dtype.
        head_dim: Width of one head.
        installed: Whether flash-attn is importable; looked up when None.
    """
    if not use_flash_attn:
        return Choice("sdpa", "model.use_flash_attn=False")
    if torch.device(device).type != "cuda":
        return Choice("sdpa", f"flash-attn needs a CUDA device, this is {torch.device(device).type}")
    if dtype not in flash.DTYPES:
        return Choice("sdpa", f"flash-attn has no {str(dtype).removeprefix('torch.')}")
    if head_dim > flash.LARGEST_HEAD_DIM:
        return Choice("sdpa", f"flash-attn takes heads of up to {flash.LARGEST_HEAD_DIM}, these have {head_dim}")
    if not (importlib.util.find_spec("flash_attn") is not None if installed is None else installed):
        return Choice("sdpa", "flash-attn is not installed; pip install 'internlm-ds[flash]'")
    return Choice("flash")


def attention_function(name: str, *, use_flash_attn: bool) -> Attend:
    """The function behind a backend's name; `auto` looks at the tensors of each call.

    Raises:
        ConfigError: There is no such backend.
    """
    if name == "auto":
        return _automatic(use_flash_attn)
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} does not exist; there are auto, {', '.join(BACKENDS)}")
    return BACKENDS[name]


def _automatic(use_flash_attn: bool) -> Attend:
    chosen: dict[tuple[torch.device, torch.dtype], Attend] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: object, *, dropout: float = 0.0) -> Tensor:
        key = (q.device, q.dtype)
        if key not in chosen:
            chosen[key] = select(use_flash_attn, device=q.device, dtype=q.dtype, head_dim=q.shape[-1]).attend
        return chosen[key](q, k, v, segments, dropout=dropout)

    return attend
