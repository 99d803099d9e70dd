"""InternLM's rule for the loss scale of fp16, as a value that knows no tensors.

What counts as an overflow (an infinite norm, not a NaN) and on which rank it is agreed is `engine`'s business.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from internlm_ds.config.schema import GradScalerConfig
from internlm_ds.errors import CheckpointError, ConfigError, Problem

_SMALLEST = 2.0**-126
_STATE = ("scale", "growth_step", "hysteresis_step")


class DynamicLossScale:
    """A float32 scale that grows after quiet steps and backs off after overflows.

    The count of overflows is cleared when the scale grows, not when it backs off: once `hysteresis` overflows have been
    seen, each further one backs off at once until the scale grows again.

    Args:
        initial_scale: First scale, > 0.
        min_scale: Lower bound; None or 0 for none.
        max_scale: Upper bound; None or 0 for none.
        growth_factor: > 1.
        backoff_factor: Between 0 and 1.
        growth_interval: Steps without overflow before the scale grows.
        hysteresis: Overflows before the scale backs off.
    Raises:
        ConfigError: An argument is out of its range; all of them are listed.
    Source: InternEvo `DynamicGradScaler`.

    >>> scale = DynamicLossScale(initial_scale=8.0, hysteresis=1)
    >>> scale.update(overflow=True)
    >>> scale.scale
    4.0
    """

    def __init__(
        self,
        *,
        initial_scale: float = 2.0**16,
        min_scale: float | None = None,
        max_scale: float | None = None,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 1000,
        hysteresis: int = 2,
    ):
        self.min_scale, self.max_scale = min_scale or None, max_scale or None
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.hysteresis = growth_interval, hysteresis
        problems = _out_of_range(self, initial_scale)
        if problems:
            raise ConfigError(problems)
        self.scale = _float32(initial_scale)
        self.growth_step = 0
        self.hysteresis_step = 0

    @classmethod
    def from_config(cls, config: GradScalerConfig) -> DynamicLossScale:
        """The scaler that `grad_scaler` describes."""
        return cls(
            initial_scale=config.fp16.initial_scale,
            min_scale=config.fp16.min_scale,
            max_scale=config.max_scale,
            growth_factor=config.growth_factor,
            backoff_factor=config.backoff_factor,
            growth_interval=config.fp16.growth_interval,
            hysteresis=config.hysteresis,
        )

    def update(self, overflow: bool) -> None:
        """Take note of one step: did its gradient norm overflow?"""
        if overflow:
            self.hysteresis_step += 1
            self.growth_step = 0
            if self.hysteresis_step >= self.hysteresis:
                self._back_off()
            return
        self.growth_step += 1
        if self.growth_step == self.growth_interval:
            self.growth_step = self.hysteresis_step = 0
            self._grow()

    def state_dict(self) -> dict[str, float | int]:
        """All that changes, as JSON can hold it."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            CheckpointError: An entry is missing, or the scale is not a positive number.
        """
        missing = [name for name in _STATE if name not in state]
        if missing:
            raise CheckpointError(f"state of the loss scale lacks {', '.join(missing)}; found {sorted(state)}")
        scale = float(state["scale"])
        if not (math.isfinite(scale) and scale > 0):
            raise CheckpointError(f"state of the loss scale holds scale = {scale}; it must be a positive number")
        self.scale = _float32(scale)
        self.growth_step, self.hysteresis_step = int(state["growth_step"]), int(state["hysteresis_step"])

    def _back_off(self) -> None:
        # never down to zero: dividing gradients by it would turn every later step into NaN
        lower = max(_float32(self.scale * _float32(self.backoff_factor)), _SMALLEST)
        self.scale = lower if self.min_scale is None else max(lower, _float32(self.min_scale))

    def _grow(self) -> None:
        higher = _float32(self.scale * _float32(self.growth_factor))
        if math.isinf(higher):
            # an infinite scale could never come back down
            return
        self.scale = higher if self.max_scale is None else min(higher, _float32(self.max_scale))


def _float32(value: float) -> float:
    """The nearest float32; infinity beyond its range."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def _out_of_range(scaler: DynamicLossScale, initial_scale: float) -> list[Problem]:
    low, high = scaler.min_scale, scaler.max_scale
    checks = [
        (
            "fp16.initial_scale",
            initial_scale,
            _is_positive(initial_scale),
            "must be a finite number above 0, e.g. 2**16",
        ),
        (
            "fp16.min_scale",
            low,
            low is None or _is_positive(low),
            "must be a finite number above 0, or None for no bound",
        ),
        ("fp16.growth_interval", scaler.growth_interval, scaler.growth_interval >= 1, "must be at least 1 step"),
        ("growth_factor", scaler.growth_factor, scaler.growth_factor > 1, "must be above 1, e.g. 2"),
        ("backoff_factor", scaler.backoff_factor, 0 < scaler.backoff_factor < 1, "must lie between 0 and 1, e.g. 0.5"),
        (
            "max_scale",
            high,
            high is None or _is_positive(high),
            "must be a finite number above 0, or None for no bound",
        ),
        ("max_scale", high, low is None or high is None or low <= high, f"must not be below fp16.min_scale = {low}"),
        ("hysteresis", scaler.hysteresis, scaler.hysteresis >= 0, "must be 0 or more overflows"),
    ]
    return [Problem(f"grad_scaler.{key}", message, value) for key, value, good, message in checks if not good]


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
