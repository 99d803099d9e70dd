"""Does a meta describe its bin? If not: how they came apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from internlm_ds.data.binmeta import IntArray, meta_path, read_meta
from internlm_ds.data.doctor.findings import Finding
from internlm_ds.data.doctor.lines import Lines
from internlm_ds.errors import DataFormatError


def check_meta(path: str, lines: Lines) -> Iterator[Finding]:
    """What is wrong with the meta of the bin `path`."""
    if not meta_path(path).is_file():
        yield Finding("meta-missing", path, f"{meta_path(path).name} is missing")
        return
    try:
        offsets, lengths = read_meta(path)
    except DataFormatError as error:
        yield Finding("meta-unreadable", path, str(error).split(". To mend it", 1)[0])
        return
    yield from compare(path, lines, offsets, lengths)


def compare(path: str, lines: Lines, offsets: IntArray, lengths: IntArray) -> Iterator[Finding]:
    """The rows of a meta against the lines of its bin."""
    both = min(len(offsets), len(lines))
    same_place = offsets[:both] == lines.offsets[:both]
    same = same_place & (lengths[:both] == lines.lengths[:both])
    counts = f"the meta has {len(offsets)} rows, the bin {len(lines)} samples"
    if len(offsets) != len(lines) and same.all():
        why = "the bin has grown since the meta was written" if both < len(lines) else "the bin has lost its end"
        yield Finding("meta-stale", path, f"{counts}: {why}", both + 1, _offset(lines, both))
    elif both > 1 and not same_place[1:].any():
        yield Finding("meta-foreign", path, f"{counts}, and from the second on no offset fits", 2, _offset(lines, 1))
    else:
        if len(offsets) != len(lines):
            yield Finding("meta-stale", path, counts)
        for row in np.flatnonzero(~same_place).tolist():
            message = f"meta row {row} says byte {offsets[row]}, the line begins at {lines.offsets[row]}"
            yield Finding("meta-offset", path, message, *_place(lines, row))
        for row in np.flatnonzero(same_place & ~same).tolist():
            message = f"meta row {row} says {lengths[row]} tokens, the line has {lines.lengths[row]}"
            yield Finding("meta-length", path, message, *_place(lines, row))


def _place(lines: Lines, row: int) -> tuple[int, int]:
    return int(lines.numbers[row]), int(lines.offsets[row])


def _offset(lines: Lines, row: int) -> int:
    return int(lines.offsets[row]) if row < len(lines) else lines.size
