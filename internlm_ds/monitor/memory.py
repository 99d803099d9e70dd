"""Peak memory of this process, on whatever device it computes. torch is imported when a number is asked for."""

from __future__ import annotations

import sys


def peak_allocated_bytes() -> int:
    """Largest allocation so far: torch's on CUDA, else the resident set of the process, in bytes."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> None:
    """Forget the peak of the CUDA allocator; the resident set of a process cannot be reset."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
