"""The compiled scan: the usual line of a bin at memory speed, every other line left to `lines`.

Usual means byte for byte what `json.dumps` writes, ended by a newline. Importing this file imports numba and compiles
on the first call (kept on disk for the next process).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numba
import numpy as np

from internlm_ds.data.doctor import repeats
from internlm_ds.data.doctor.lines import DIGEST_FACTOR, LARGEST_SHOWN, Columns, Lines, join

_HEAD = np.frombuffer(b'{"tokens": [', dtype=np.uint8)
_FACTOR = np.uint64(DIGEST_FACTOR)
_LARGEST = int(LARGEST_SHOWN)
_NEWLINE, _COMMA, _BLANK, _MINUS, _CLOSE, _BRACE = (ord(sign) for sign in "\n, -]}")
_MOST_DIGITS = 18  # any more may not fit 64 bits


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code that runs beside Python's other threads; kept on disk where there is a place."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in
        return numba.njit(nogil=True)(function)


def measure_compiled(block: bytes | memoryview) -> Lines:
    """What `lines.measure_plainly` says, block by block at memory speed."""
    data = np.frombuffer(block, dtype=np.uint8)
    ends = int(_last_end(data))
    begins = np.empty(int(_count_newlines(data)), dtype=np.int64)
    lengths, learned, largest = np.empty_like(begins), np.empty(len(begins), np.int32), np.empty(len(begins), np.int32)
    digests, usual = np.empty(len(begins), np.uint64), np.empty(len(begins), np.bool_)
    _scan(data, begins, lengths, learned, largest, digests, usual)
    if usual.all():
        whole = _usual_lines(ends, begins, lengths, learned, largest, digests)
    else:
        whole = _with_odd_lines(memoryview(block), ends, (begins, lengths, learned, largest, digests), usual)
    if ends == len(data):
        return whole
    rest = Columns()
    rest.add(memoryview(block)[ends:], offset_bytes=0)
    return join([whole, rest.lines(len(data) - ends)])


def _usual_lines(size: int, begins: Any, lengths: Any, learned: Any, largest: Any, digests: Any) -> Lines:
    none = np.zeros(0, dtype=np.int64)
    return Lines(size, len(begins), begins, lengths, learned, largest, digests, none, none, (), 0, 0, True)


def _with_odd_lines(block: memoryview, size: int, columns: tuple[Any, ...], usual: Any) -> Lines:
    """Runs of usual lines, and between them the others one by one."""
    begins = columns[0]
    edges = np.append(begins, size)
    borders = [0, *(np.flatnonzero(np.diff(usual)) + 1).tolist(), len(begins)]
    parts = []
    for low, high in pairwise(borders):
        start, stop = int(edges[low]), int(edges[high])
        if usual[low]:
            parts.append(_usual_lines(stop - start, begins[low:high] - start, *(c[low:high] for c in columns[1:])))
        else:
            odd = Columns()
            for row in range(low, high):
                odd.add(block[int(edges[row]) : int(edges[row + 1])], offset_bytes=int(edges[row]) - start)
            parts.append(odd.lines(stop - start))
    return join(parts)


@compiled
def _last_end(data):  # type: ignore[no-untyped-def]
    """Behind the last newline: up to there no loop needs to look for the end of the block."""
    position = len(data)
    while position > 0 and data[position - 1] != _NEWLINE:
        position -= 1
    return position


@compiled
def _count_newlines(data):  # type: ignore[no-untyped-def]
    count = 0
    for byte in data:
        count += byte == _NEWLINE
    return count


@compiled
def _scan(data, begins, lengths, learned, largest, digests, usual):  # type: ignore[no-untyped-def]
    """Fill the columns, one entry for each line that has its newline; those that are not usual are only marked.

    Places are unsigned: a signed one would be tested for being counted from the end, on every byte.
    """
    one, ten, zero_sign = np.uintp(1), np.int64(10), np.uint8(48)
    position = np.uintp(0)
    for row in range(len(begins)):
        begins[row] = position
        at = np.uintp(0)
        while at < len(_HEAD) and data[position + at] == _HEAD[at]:
            at += one
        good = at == len(_HEAD)
        position += at
        count, positive, first_positive = np.int64(0), np.int64(0), np.int64(0)
        most, value_sum = np.int64(-1), np.uint64(1)
        more = good and data[position] != _CLOSE
        while more:
            negative = data[position] == _MINUS
            position += np.uintp(negative)
            first, value = position, np.int64(0)
            digit = np.uint8(data[position] - zero_sign)
            while digit <= 9:
                value = value * ten + digit
                position += one
                digit = np.uint8(data[position] - zero_sign)
            width = position - first
            if width == 0 or width > _MOST_DIGITS or (data[first] == zero_sign and (width > one or negative)):
                good = False
                break
            most = max(most, value)
            value = -value if negative else value
            positive += value > 0
            if count == 0:
                first_positive = positive
            count += 1
            value_sum = value_sum * _FACTOR + np.uint64(value)
            more = data[position] == _COMMA and data[position + one] == _BLANK
            if more:
                position += np.uintp(2)
        if good and data[position] == _CLOSE and data[position + one] == _BRACE:
            good = data[position + np.uintp(2)] == _NEWLINE
        else:
            good = False
        usual[row] = good
        lengths[row], learned[row], digests[row] = count, positive - first_positive, value_sum
        largest[row] = min(most, _LARGEST)
        while data[position] != _NEWLINE:
            position += one
        position += one


border_lengths = compiled(repeats.border_lengths)
prefix_matches = compiled(repeats.prefix_matches)
