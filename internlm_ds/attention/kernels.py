"""What a kernel that not every machine has must fit, and a trial of it before training starts.

A package can be installed and yet be of no use: built for another torch or CUDA, or without code for this device. So a
kernel is imported, called once, forward and backward, on a few tokens, and what goes wrong becomes a reason in words:
`Unfit`. What follows from that is `select`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm_ds.attention.segments import Segments

Attend = Callable[..., Tensor]
HALF = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256
OLDEST_CAPABILITY = 8
"""Flash kernels need tensor cores of Ampere (8.0) or later."""
_LONGEST_REASON = 240


class Unfit(Exception):
    """A backend cannot run here; the message says why, and what to do about it if there is something."""


@dataclass(frozen=True)
class Setting:
    """What attention is asked for.

    Attributes:
        device: Where the tensors live.
        dtype: Theirs.
        head_dim: Width of one head.
        dropout: Of attention weights, in training.
        deterministic: Gradients must be the same bits each time.
        capability: Major compute capability of a CUDA device, 0 elsewhere.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    dropout: float = 0.0
    deterministic: bool = False
    capability: int = 0

    @classmethod
    def of(cls, device: torch.device | str, dtype: torch.dtype, head_dim: int, **others: float | bool) -> Setting:
        """With the capability that the device has."""
        device = torch.device(device)
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        return cls(device, dtype, head_dim, capability=capability, **others)  # type: ignore[arg-type]


def check_flash(name: str, setting: Setting) -> None:
    """What holds for every flash kernel: CUDA, half precision, Ampere, heads that are not too wide.

    Raises:
        Unfit: One of these does not hold.
    """
    if setting.device.type != "cuda":
        raise Unfit(f"{name} needs a CUDA device, this is {setting.device.type}")
    if setting.dtype not in HALF:
        raise Unfit(f"{name} has no {str(setting.dtype).removeprefix('torch.')}")
    if setting.capability < OLDEST_CAPABILITY:
        raise Unfit(f"{name} needs compute capability {OLDEST_CAPABILITY}.0, this device has {setting.capability}.x")
    if setting.head_dim > LARGEST_HEAD_DIM:
        raise Unfit(f"{name} takes heads of up to {LARGEST_HEAD_DIM}, these have {setting.head_dim}")


def trial(attend: Attend, setting: Setting) -> None:
    """Call a kernel once on the device, forward and backward, on two short segments.

    Raises:
        Exception: Whatever the kernel raises.
    """
    q, k, v = (
        torch.zeros(24, 1, setting.head_dim, device=setting.device, dtype=setting.dtype, requires_grad=True)
        for _ in range(3)
    )
    borders = torch.tensor([0, 8, 24], dtype=torch.int32, device=setting.device)
    with torch.enable_grad():
        attend(q, k, v, Segments(borders), dropout=setting.dropout).sum().backward()
    if setting.device.type == "cuda":  # errors of kernels show up here
        torch.cuda.synchronize(setting.device)


def on_one_line(error: BaseException) -> str:
    """An error's words without line breaks, cut where they get long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
