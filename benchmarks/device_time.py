"""Seconds of work on a device, which may still be at it when the call returns."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def wait(device: str | torch.device) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(work: Callable[[], object], device: str | torch.device, *, times: int = 1) -> float:
    """Seconds of one `work()` by the clock: the mean of so many in a row."""
    return _measured(work, device, times, time.perf_counter)


def busy(work: Callable[[], object], device: str | torch.device, *, times: int = 1) -> float:
    """Seconds of one `work()`: of the processor on a CPU, which other work moves least, by the clock on a GPU."""
    clock = time.perf_counter if torch.device(device).type == "cuda" else time.process_time
    return _measured(work, device, times, clock)


def _measured(work: Callable[[], object], device: str | torch.device, times: int, clock: Callable[[], float]) -> float:
    wait(device)
    started = clock()
    for _ in range(times):
        work()
    wait(device)
    return (clock() - started) / times
