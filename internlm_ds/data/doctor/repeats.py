"""Was the same input written into a bin twice? Repeated stretches in the order of samples.

The reference's tool appends: run twice it doubles its output, and an interrupted second run leaves the beginning once
more. What counts is a stretch of samples, in order, that is there again at the end; single equal samples are normal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FEWEST_WHOLE = 3
"""Different samples that a stretch must have to count if the whole bin consists of it, over and over."""
FEWEST_PART = 20
"""Different samples that it must have else."""


@dataclass(frozen=True)
class Repeat:
    """Samples from `first` on are those from `source` on once more.

    Attributes:
        first: Row of the first sample that is there again; it and all behind it can go.
        source: Row of the sample that it repeats.
        times: How often the whole bin holds its beginning, 1 where only a part is repeated.
    """

    first: int
    source: int
    times: int


def find_repeat(digests: npt.NDArray[np.uint64], *, kernels: Any = None) -> Repeat | None:
    """The longest repetition at the end of a bin, None if there is none worth the name.

    Args:
        digests: `(n,)`, equal for equal samples.
        kernels: The module `kernel`, for long bins; None works plainly.

    >>> find_repeat(np.array([1, 2, 3, 1, 2, 3], dtype=np.uint64))
    Repeat(first=3, source=0, times=2)
    """
    count = len(digests)
    borders: Callable[..., Any] = kernels.border_lengths if kernels else border_lengths
    matches: Callable[..., Any] = kernels.prefix_matches if kernels else prefix_matches
    border = int(borders(digests)[-1]) if count else 0
    period = count - border
    if border and _is_real(digests[:period], whole=count % period == 0, length=border):
        return Repeat(period, 0, count // period)
    if count < 2 * FEWEST_PART:
        return None
    backwards = matches(digests[::-1].copy())
    squares = np.flatnonzero(backwards[FEWEST_PART:] >= np.arange(FEWEST_PART, count)) + FEWEST_PART
    size = int(squares[-1]) if len(squares) else 0
    if size and _is_real(digests[count - size :], whole=False, length=size):
        return Repeat(count - size, count - 2 * size, 1)
    return None


def border_lengths(values):  # type: ignore[no-untyped-def]
    """At each place, how long the longest proper beginning of `values` is that ends there (Knuth, Morris, Pratt)."""
    found = np.zeros(len(values), dtype=np.int64)
    length = 0
    for place in range(1, len(values)):
        while length > 0 and values[place] != values[length]:
            length = found[length - 1]
        if values[place] == values[length]:
            length += 1
        found[place] = length
    return found


def prefix_matches(values):  # type: ignore[no-untyped-def]
    """From each place on, how many values equal those at the beginning (the Z function)."""
    found = np.zeros(len(values), dtype=np.int64)
    left, right = 0, 0
    for place in range(1, len(values)):
        length = min(right - place, found[place - left]) if place < right else 0
        while place + length < len(values) and values[length] == values[place + length]:
            length += 1
        if place + length > right:
            left, right = place, place + length
        found[place] = length
    return found


def _is_real(stretch: npt.NDArray[np.uint64], *, whole: bool, length: int) -> bool:
    """A stretch of equal samples, or one of few, is no sign of a second run."""
    different = len(np.unique(stretch[:length]))
    return different >= (FEWEST_WHOLE if whole else FEWEST_PART)
