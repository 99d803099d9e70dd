"""What is tidied between batches and never inside a step: Python's garbage and the CUDA allocator's cache.

Everything that a run keeps exists after its first batch: it is put out of the garbage collector's sight then, so that
collections, which come at any moment, look at a step's few objects alone.
"""

from __future__ import annotations

import gc
import logging

import torch

from internlm_ds.monitor import memory

logger = logging.getLogger(__name__)

GIB = 2**30


class Housekeeping:
    """Called after each batch.

    Args:
        every: Batches between two tidyings (`data.empty_cache_and_diag_interval`), each with a line about memory.
        device: Where the model computes.
    """

    def __init__(self, *, every: int, device: torch.device):
        self.every, self.device = every, device
        self._batches = 0

    def batch_done(self) -> None:
        """A batch is done."""
        self._batches += 1
        if self._batches == 1:
            gc.collect()
            gc.freeze()
        if self._batches % self.every == 0:
            gc.collect()
            logger.info("%s", self._line())
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def close(self) -> None:
        """The run ends: what it kept may be collected again."""
        gc.unfreeze()

    def _line(self) -> str:
        if self.device.type != "cuda":
            return f"memory: {memory.peak_resident_bytes() / GIB:.2f} GiB resident at most"
        allocated, reserved = torch.cuda.memory_allocated(self.device), torch.cuda.memory_reserved(self.device)
        return (
            f"memory: {allocated / GIB:.2f} GiB allocated, {memory.peak_allocated_bytes() / GIB:.2f} GiB at most, "
            f"{reserved / GIB:.2f} GiB reserved, of which the rest is given back"
        )
