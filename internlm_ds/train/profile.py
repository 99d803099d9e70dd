"""`--profile`: torch's profiler over a few early steps, as traces for Perfetto or TensorBoard in the run directory.

Beside each trace lies a table of where a step's time goes, which the log has, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from internlm_ds.parallel.context import ParallelContext
from internlm_ds.train import profile_ranges, profile_table
from internlm_ds.train.profile_table import STEP, Span

logger = logging.getLogger(__name__)

# the first steps fill caches and allocators; a handful of steps says it all, and each is megabytes of trace
SKIPPED_STEPS, WARMUP_STEPS, TRACED_STEPS = 1, 1, 2


class StepProfiler:
    """Traces steps 3 and 4 of a launch, on the first data-parallel and tensor rank of each stage.

    Args:
        folder: The run directory; traces go to `traces/` below it.
        context: Where this process stands.
        engine, loader: Of the run: ranges are laid around their parts while the profiler runs.
        compiled: Is the model compiled? It gets no ranges then; its kernels are told by their names.
    """

    def __init__(self, folder: Path, context: ParallelContext, *, engine: Any, loader: Any, compiled: bool = False):
        self._profile: profile | None = None
        self._steps = 0
        if context.data.rank or context.tensor.rank:
            return
        coord = context.coord
        self._file = folder / "traces" / f"rank{context.rank}_dp{coord.data}_tp{coord.tensor}_pp{coord.pipe}.json"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=TRACED_STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._take_away = profile_ranges.lay(engine, loader, modules=not compiled)
        self._profile.start()

    def step(self) -> None:
        """A batch is done."""
        self._steps += 1
        if self._profile is None:
            return
        self._profile.step()
        if self._steps >= SKIPPED_STEPS + WARMUP_STEPS + TRACED_STEPS:
            self._stop()

    def close(self) -> None:
        """The run ends; says so if that was before a trace could be written."""
        if self._profile is not None:
            logger.warning("--profile: the run ended before step %d, the trace is not complete", SKIPPED_STEPS + 3)
            self._stop()

    def _stop(self) -> None:
        done, self._profile = self._profile, None
        assert done is not None, "stopped once"
        done.stop()
        self._take_away()

    def _write(self, done: profile) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._file))
        text = profile_table.render(time_of_rooms(done.events()), steps=TRACED_STEPS)
        self._file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        logger.info("profile of %d steps written to %s\n%s", TRACED_STEPS, self._file, text)


def time_of_rooms(events: Sequence[Any]) -> dict[str, float]:
    """Microseconds by room of the profiled steps: the device's, if any was used, else the processor's.

    A device's kernels count where they were started, whichever thread did it; of the processor the thread that trains.
    """
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    on_device = any(event.kernels for event in on_cpu)
    counted = on_cpu if on_device else [event for event in on_cpu if _in_step(event)]
    places = {id(event): place for place, event in enumerate(counted)}
    spans = [
        Span(
            event.name,
            sum(kernel.duration for kernel in event.kernels) if on_device else event.self_cpu_time_total,
            parent=places.get(id(event.cpu_parent)),
            sequence=event.sequence_nr if event.sequence_nr is not None else -1,
            # torch's RecordScope.BACKWARD_FUNCTION
            backward=event.scope == 1,
        )
        for event in counted
    ]
    steps = sum(event.time_range.elapsed_us() for event in on_cpu if event.name.startswith(STEP))
    return profile_table.shares(spans, total_us=steps if on_device else None)


def _in_step(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(STEP):
            return True
        event = event.cpu_parent
    return False
