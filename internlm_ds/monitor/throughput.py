"""Tokens per second and teraflops of a training run, under InternLM's names.

Counting operations is `plan.compute`'s, measuring forward and backward `train.step`'s; the clock is passed in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

SMOOTHING_STEPS = 50


class ThroughputMeter:
    """A stop watch around each batch, loading included, and the averages over its readings.

    Args:
        world_size: Ranks of the run.
        flops_per_step: Operations of a step on all ranks together (`plan.compute.flops_per_step`).
        clock: Seconds, rising.

    Use `start()` before a batch is loaded, `stop(tokens=…)` when its metrics are due.
    """

    def __init__(self, *, world_size: int, flops_per_step: float, clock: Callable[[], float] = time.perf_counter):
        self.world_size = world_size
        self.flops_per_step = flops_per_step
        self._clock = clock
        self._started: float | None = None
        self._steps = 0
        self._total = _Sum()
        self._sum_of_last = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=SMOOTHING_STEPS)
        self._blocks = {10: _Block(10), 50: _Block(50)}

    def start(self) -> None:
        """A batch begins."""
        self._started = self._clock()

    def stop(self, *, tokens: int) -> dict[str, float]:
        """A batch is done.

        Args:
            tokens: Tokens of the batch on all ranks.
        Returns:
            `tflops` (per rank), `tgs` (tokens per rank and second), `tgs/last_tgs_1`, `tgs/tgs_all` (since the start),
            `tgs/tgs_avg` (mean over steps), `tgs/tgs_SMA` (last 50 steps), `tgs/last_tgs_10` and `tgs/last_tgs_50`
            (last full block of so many steps, 0 before the first), `step_time` (seconds). Rates have 2 decimals, as in
            InternLM.
        """
        assert self._started is not None, "ThroughputMeter.stop() without start()"
        seconds = self._clock() - self._started
        self._started = None
        return self.record(tokens=tokens, seconds=seconds)

    def record(self, *, tokens: int, seconds: float) -> dict[str, float]:
        """As `stop`, with the duration given."""
        seconds = max(seconds, 1e-9)
        # InternLM rounds the tokens of a rank to 4 decimals before it sums them
        tokens_per_rank = round(tokens / self.world_size, 4)
        last = round(tokens_per_rank / seconds, 2)
        self._steps += 1
        self._sum_of_last += last
        self._total.add(tokens_per_rank, seconds)
        self._recent.append((tokens_per_rank, seconds))
        for block in self._blocks.values():
            block.add(tokens_per_rank, seconds)
        return {
            "tflops": self.flops_per_step / (seconds * self.world_size * 10**12),
            "tgs": round(tokens / self.world_size / seconds, 2),
            "tgs/last_tgs_1": last,
            "tgs/tgs_all": self._total.rate,
            "tgs/tgs_avg": round(self._sum_of_last / self._steps, 2),
            "tgs/tgs_SMA": round(sum(t for t, _ in self._recent) / sum(s for _, s in self._recent), 2),
            "tgs/last_tgs_10": self._blocks[10].rate,
            "tgs/last_tgs_50": self._blocks[50].rate,
            "step_time": seconds,
        }


class _Sum:
    def __init__(self) -> None:
        self.tokens = 0.0
        self.seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    @property
    def rate(self) -> float:
        return round(self.tokens / self.seconds, 2)


class _Block:
    """The rate of the last complete run of `length` steps."""

    def __init__(self, length: int):
        self._length = length
        self._steps = 0
        self._current = _Sum()
        self.rate: float = 0

    def add(self, tokens: float, seconds: float) -> None:
        self._current.add(tokens, seconds)
        self._steps += 1
        if self._steps == self._length:
            self.rate = self._current.rate
            self._steps, self._current = 0, _Sum()
