"""The tokens of single samples of a scanned bin, for messages and for looking at what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.doctor.lines import Lines, decode_odd_line


@contextmanager
def opened_rows(path: str, lines: Lines) -> Iterator[Callable[[int], IntArray]]:
    """A function from a sample's row to its tokens, signed as on disk."""
    with open(path, "rb") as file:

        def tokens(row: int) -> IntArray:
            file.seek(int(lines.offsets[row]))
            return decode_odd_line(file.readline())

        yield tokens


def spread_rows(count: int, most: int) -> list[int]:
    """Up to `most` rows, the same each time, spread over all.

    >>> spread_rows(9, 3)
    [0, 4, 8]
    """
    picked: list[int] = np.linspace(0, count - 1, num=min(most, count), dtype=np.int64).tolist()
    return sorted(set(picked))
