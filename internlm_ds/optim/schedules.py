"""Learning rate and Adam's beta2 as closed forms of the number of successful updates.

Nothing here has a state: an interrupted run continues exactly, whatever it loads. Setting the values in an optimizer is
`engine`'s.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from internlm_ds.config.schema import Config


def learning_rate(
    t: int,
    *,
    base_lr: float,
    total_steps: int,
    init_steps: int = 0,
    warmup_ratio: float = 0.0,
    eta_min: float = 0.0,
) -> float:
    """Rate of update number `t`, counted from 0: zero for `init_steps`, a linear warm-up, then half a cosine.

    With s = `init_steps`, w = `int(total_steps * warmup_ratio)` and T = `total_steps - w - s`::

        t < s             0
        s <= t < s + w    base * (t + 1 - s) / w
        t >= s + w        eta_min + (base - eta_min) * (1 + cos(pi * (t - s - w) / T)) / 2

    Without a warm-up but with initial steps the reference's recursion starts from rate 0, so that its "cosine" rises
    from 0 to `eta_min` at t = s + T; kept, because configurations are tuned to what it does (`LrSchedule.warnings` says
    so). A T of zero or less leaves no room for a cosine: `eta_min`.

    Source: InternEvo `FineTuneCosineAnnealingWarmupLR`.

    >>> learning_rate(0, base_lr=1e-4, total_steps=50000, warmup_ratio=0.01, eta_min=1e-5)
    2.0000000000000002e-07
    """
    warmup_steps = int(total_steps * warmup_ratio)
    cosine_steps = total_steps - warmup_steps - init_steps
    if t < init_steps:
        return 0.0
    if t < init_steps + warmup_steps:
        return (t + 1 - init_steps) / warmup_steps * base_lr
    if cosine_steps <= 0:
        return eta_min
    phase = t - init_steps - warmup_steps
    share = (1 + math.cos(math.pi * phase / cosine_steps)) / 2
    if warmup_steps == 0 and init_steps > 0 and phase <= cosine_steps:
        return eta_min * (1 - share)
    return eta_min + (base_lr - eta_min) * share


def beta2(k: int, *, init_beta2: float, c: float) -> float:
    """Adam's beta2 after `k` successful updates: `max(init_beta2, 1 - k ** -c)`, `init_beta2` alone when `c <= 0`.

    At k = 0 the second term is minus infinity, so `init_beta2` holds (the reference divides by zero there).

    Source: InternEvo `Beta2Scheduler`.

    >>> beta2(100, init_beta2=0.95, c=0.8)
    0.9748811356849042
    """
    if c <= 0 or k <= 0:
        return init_beta2
    return max(init_beta2, 1 - 1 / math.pow(k, c))


@dataclass(frozen=True)
class LrSchedule:
    """`lr_scheduler` and `adam.lr` as one function of the number of successful updates."""

    base_lr: float
    total_steps: int
    init_steps: int = 0
    warmup_ratio: float = 0.0
    eta_min: float = 0.0

    @classmethod
    def from_config(cls, config: Config) -> LrSchedule:
        s = config.lr_scheduler
        return cls(config.adam.lr, s.total_steps, s.init_steps, s.warmup_ratio, s.eta_min)

    def at(self, num_updates: int) -> float:
        """Rate of the next update when `num_updates` have been made."""
        return learning_rate(
            num_updates,
            base_lr=self.base_lr,
            total_steps=self.total_steps,
            init_steps=self.init_steps,
            warmup_ratio=self.warmup_ratio,
            eta_min=self.eta_min,
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know about this schedule."""
        if self.init_steps > 0 and int(self.total_steps * self.warmup_ratio) == 0:
            return (
                f"lr_scheduler.init_steps = {self.init_steps} without a warm-up: as in InternLM the rate rises from 0 "
                f"to eta_min = {self.eta_min} and never reaches adam.lr = {self.base_lr}; "
                "set lr_scheduler.warmup_ratio > 0",
            )
        return ()


@dataclass(frozen=True)
class Beta2Schedule:
    """`beta2_scheduler` as a function of the number of successful updates.

    Attributes:
        adam_beta2: What the optimizer uses for the first update of all.
        init_beta2: Lower bound afterwards.
        c: Exponent; 0 or less keeps `init_beta2`.
        first: Count that the first update starts from (`cur_iter`, where -1 means 0).
    """

    adam_beta2: float
    init_beta2: float
    c: float = 0.8
    first: int = 0

    @classmethod
    def from_config(cls, config: Config) -> Beta2Schedule:
        s = config.beta2_scheduler
        return cls(config.adam.adam_beta2, s.init_beta2, s.c, max(s.cur_iter, 0))

    def at(self, num_updates: int) -> float:
        """beta2 of the next update when `num_updates` have been made."""
        if num_updates <= 0:
            return self.adam_beta2
        return beta2(self.first + num_updates, init_beta2=self.init_beta2, c=self.c)


def recorded_settings(config: Config, *, num_updates: int) -> dict[str, Any]:
    """Rates and Adam's numbers as a checkpoint keeps them, for a conversion that has no configuration at hand."""
    betas = [config.adam.adam_beta1, Beta2Schedule.from_config(config).at(num_updates)]
    return {
        "adam": {"betas": betas, "eps": config.adam.adam_eps, "weight_decay": config.adam.weight_decay},
        "lr_schedule": asdict(LrSchedule.from_config(config)),
    }
