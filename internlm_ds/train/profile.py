"""`--profile`: torch's profiler over a few early steps, as traces for Perfetto or TensorBoard in the run directory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from internlm_ds.parallel.context import ParallelContext

logger = logging.getLogger(__name__)

# the first steps fill caches and allocators; a handful of steps says it all, and each is megabytes of trace
SKIPPED_STEPS, WARMUP_STEPS, TRACED_STEPS = 1, 1, 2


class StepProfiler:
    """Traces steps 3 and 4 of a launch, on the first data-parallel and tensor rank of each stage.

    Args:
        folder: The run directory; traces go to `traces/` below it.
        context: Where this process stands.
    """

    def __init__(self, folder: Path, context: ParallelContext):
        self._profile: profile | None = None
        self._steps = 0
        if context.data.rank or context.tensor.rank:
            return
        coord = context.coord
        self._file = folder / "traces" / f"rank{context.rank}_dp{coord.data}_tp{coord.tensor}_pp{coord.pipe}.json"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=SKIPPED_STEPS, warmup=WARMUP_STEPS, active=TRACED_STEPS, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
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

    def _write(self, done: profile) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        done.export_chrome_trace(str(self._file))
        logger.info("profile of %d steps written to %s", TRACED_STEPS, self._file)
