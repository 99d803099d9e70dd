"""Which attention backend runs, and the one log line that says so.

`use_flash_attn` of an InternLM configuration is a wish: with it off, plain attention runs; with it on, the best
backend at hand: flash-attn, torch's varlen attention, torch's SDPA. `internlm_ds.attention` names one, and then it is
that one or an error. The backends themselves are next door.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internlm_ds.attention import flash, kernels, reference, sdpa, varlen
from internlm_ds.attention.kernels import Attend, Setting, Unfit
from internlm_ds.errors import ConfigError, MachineError

BACKENDS = ("flash", "varlen", "sdpa", "reference")
"""By name, the best first; the last two run anywhere."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and why.

    Attributes:
        name: One of `BACKENDS`.
        attend: Its function, `attend(q, k, v, segments, *, dropout=0.0)`.
        words: The backend in the log's words, with the version of a package.
        reason: What kept a better one away; empty when the wish was granted as it stands.
    """

    name: str
    attend: Attend
    words: str
    reason: str = ""

    @property
    def line(self) -> str:
        """What the log says, once."""
        return f"attention: {self.words}" + (f" ({self.reason})" if self.reason else "")


def select(
    wish: str = "auto",
    *,
    use_flash_attn: bool = True,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float = 0.0,
    deterministic: bool = False,
) -> Choice:
    """The backend for tensors of this kind.

    Args:
        wish: `auto`, or a backend that it must be.
        use_flash_attn: `model.use_flash_attn`; says what `auto` is.
        device: Where the activations live.
        dtype: Their dtype.
        head_dim: Width of one head.
        dropout: Of attention weights, in training.
        deterministic: flash-attn's backward must give the same bits each time; for torch's own kernels
            `torch.use_deterministic_algorithms` says so, which is the caller's to set.
    Raises:
        ConfigError: There is no such backend.
        MachineError: It was asked for by name and cannot run here: why, and what can.
    """
    if wish != "auto" and wish not in BACKENDS:
        raise ConfigError(f"attention backend {wish!r} does not exist; there are auto, {', '.join(BACKENDS)}")
    setting = Setting.of(device, dtype, head_dim, dropout=dropout, deterministic=deterministic)
    if wish == "auto":
        return best(setting) if use_flash_attn else _plain("sdpa", "model.use_flash_attn=False")
    try:
        return _find(wish, setting)
    except Unfit as why:
        raise MachineError(
            f'internlm_ds.attention = "{wish}": {why}; what runs here: {", ".join(["auto", *_fitting(setting)])}'
        ) from None


def best(setting: Setting) -> Choice:
    """The first backend of `BACKENDS` that can run; SDPA always can."""
    reasons: list[str] = []
    for name in ("flash", "varlen"):
        try:
            found = _find(name, setting)
        except Unfit as why:
            reasons.append(str(why))
            if setting.device.type != "cuda" or setting.dtype not in kernels.HALF:
                break  # the next would say the same
        else:
            return Choice(found.name, found.attend, found.words, "; ".join([*reasons, *filter(None, [found.reason])]))
    return _plain("sdpa", "; ".join(reasons))


def attention_function(name: str, *, use_flash_attn: bool) -> Attend:
    """The function behind a backend's name, chosen at the first call by the tensors it gets.

    Raises:
        ConfigError: There is no such backend.
    """
    if name in ("sdpa", "reference"):
        return _plain(name).attend
    if name != "auto" and name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} does not exist; there are auto, {', '.join(BACKENDS)}")
    chosen: dict[tuple[torch.device, torch.dtype, bool], Attend] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: object, *, dropout: float = 0.0) -> Tensor:
        key = (q.device, q.dtype, dropout > 0)
        if key not in chosen:
            facts = {"device": q.device, "dtype": q.dtype, "head_dim": q.shape[-1], "dropout": dropout}
            chosen[key] = select(name, use_flash_attn=use_flash_attn, **facts).attend
        return chosen[key](q, k, v, segments, dropout=dropout)

    return attend


def _find(name: str, setting: Setting) -> Choice:
    """A backend that can run, or `Unfit`."""
    if name == "flash":
        kernel, reason = flash.find(setting)
        return Choice(name, kernel.attend, kernel.words, reason)
    if name == "varlen":
        return Choice(name, varlen.find(setting), f"torch {torch.__version__} varlen (flash kernels)")
    return _plain(name)


def _plain(name: str, reason: str = "") -> Choice:
    """A backend that runs anywhere."""
    if name == "sdpa":
        return Choice(name, sdpa.attend, "PyTorch SDPA", reason)
    return Choice(name, reference.attend, "reference (slow)", reason)


def _fitting(setting: Setting) -> list[str]:
    found = []
    for name in BACKENDS:
        try:
            found.append(_find(name, setting).name)
        except Unfit:
            continue
    return found
