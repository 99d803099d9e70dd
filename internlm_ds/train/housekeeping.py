"""What is tidied between batches and never inside a step: Python's garbage and the CUDA allocator's cache. On a CPU,
memory that a micro-batch frees is kept for the next.

Everything that a run keeps exists after its first batch: it is put out of the garbage collector's sight then, so that
collections, which come at any moment, look at a step's few objects alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
from collections.abc import Callable

import torch

from internlm_ds.monitor import memory

logger = logging.getLogger(__name__)

GIB = 2**30

# parameters of mallopt(3) in malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, let the C library keep what tensors free, for the next tensors; whether it does.

    glibc gives each block of 32 MB and more back to the system at once and takes it anew, page by page, at the next
    micro-batch: 7 % of a step. Afterwards that goes for blocks of more than a gigabyte only, and for the rest whenever
    the run tidies up. Other C libraries are left as they are; tensors of other devices have an allocator of torch's.
    """
    mallopt = _c_library("mallopt")
    if device.type != "cpu" or mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, GIB) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _give_freed_memory_back() -> None:
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _c_library(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where the C library is another."""
    with contextlib.suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL(None), name)
    return None


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
            else:
                _give_freed_memory_back()

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
