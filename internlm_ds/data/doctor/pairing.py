"""Does a meta describe its bin? If not: how they came apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray, meta_path, read_meta
from internlm_ds.data.doctor.findings import MOST_OF_A_KIND, Finding, at_rows, the_rest
from internlm_ds.data.doctor.lines import Lines
from internlm_ds.errors import DataFormatError

_AROUND = 1 << 32


def check_meta(path: str, lines: Lines) -> Iterator[Finding]:
    """What is wrong with the meta of the bin `path`."""
    target = meta_path(path)
    if not target.is_file():
        yield Finding("meta-missing", path, f"{target.name} does not exist")
        return
    try:
        offsets, lengths = read_meta(path)
        table = np.load(target, mmap_mode="r", allow_pickle=False)
    except (DataFormatError, OSError) as error:
        message = str(error).removeprefix(f"{target}: ").split(". To mend it", 1)[0]
        yield Finding("meta-unreadable", path, f"{target.name}: {message}")
        return
    if len(offsets) and (table.dtype not in (np.int32, np.int64) or table.shape[1] != 2):
        yield Finding("meta-type", path, f"{table.dtype} of shape {table.shape}; usual is int64 of shape (n, 2)")
    yield from compare(path, lines, offsets, lengths)


def compare(path: str, lines: Lines, offsets: IntArray, lengths: IntArray) -> Iterator[Finding]:
    """The rows of a meta against the lines of its bin.

    A row belongs to the line that begins at its offset. Rows that point into damaged lines say nothing new.

    Args:
        offsets, lengths: int64 `(n,)`, the columns of the meta.
    """
    written, (offsets, wrapped) = offsets, _unwrapped(lines, offsets)

    def says(row: int) -> str:
        return f"meta row {row} says byte {written[row]}, the line begins at {lines.offsets[row]}"

    yield from at_rows("meta-wrapped", path, lines, wrapped, says)
    owner, right = _owners(lines, offsets)
    wrong = np.flatnonzero(~right & ~_within_bad_lines(lines, offsets))
    changed = _first_of_another_state(wrong, len(offsets))
    if not len(wrong):
        yield from _missing_rows(path, lines, offsets, owner[right])
    else:
        expected = _expected_lines(owner, right)
        if changed < len(offsets):
            yield _another_state(path, lines, offsets, wrong, int(expected[wrong[0]]))
        yield from _wrong_offsets(path, lines, offsets, wrong[wrong < changed], expected)
    yield from _wrong_lengths(path, lines, lengths[:changed], owner[:changed], right[:changed])


def _unwrapped(lines: Lines, offsets: IntArray) -> tuple[IntArray, IntArray]:
    """The offsets with those that lost multiples of 4 GiB put right, and the rows of these."""
    both = min(len(offsets), len(lines))
    lost = lines.offsets[:both] - offsets[:both]
    rows = np.flatnonzero((lost != 0) & (lost % _AROUND == 0))
    mended = offsets.copy()
    mended[rows] = lines.offsets[rows]
    return mended, rows


def _owners(lines: Lines, offsets: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Sample that each meta row belongs to, and whether it truly begins at the row's offset."""
    if not len(lines):
        return np.zeros(len(offsets), dtype=np.int64), np.zeros(len(offsets), dtype=bool)
    owner = np.minimum(np.searchsorted(lines.offsets, offsets), len(lines) - 1)
    return owner, lines.offsets[owner] == offsets


def _expected_lines(owner: IntArray, right: npt.NDArray[np.bool_]) -> IntArray:
    """Sample that each meta row should belong to: counted on from the last row before it that is right."""
    numbers = np.arange(len(owner))
    before = np.maximum.accumulate(np.where(right, numbers, -1))
    return np.where(before >= 0, owner[before] + numbers - before, numbers)


def _first_of_another_state(wrong: IntArray, rows: int) -> int:
    """The row from which on most are wrong, so that they belong together; `rows` if there is none such.

    Some are right by chance even in a meta of another bin.
    """
    first = int(wrong[0]) if len(wrong) else rows
    if len(wrong) < 2 or 2 * len(wrong) <= rows - first:
        return rows
    return first if first > 1 else 0  # the first line of any bin begins at 0


def _another_state(path: str, lines: Lines, offsets: IntArray, wrong: IntArray, line: int) -> Finding:
    """Many rows point to no line's start: what happened to the bin, or to the meta."""
    counts = f"the meta has {len(offsets)} rows, the bin {len(lines)} samples"
    if (offsets[wrong] >= lines.size).all():
        return Finding("meta-stale", path, f"{counts}: the bin has lost its end", offset_bytes=lines.size)
    place = _place(lines, line)
    if wrong[0] <= 1:
        return Finding("meta-foreign", path, f"{counts}, and {len(wrong)} rows point to no line's start", *place)
    message = f"from row {wrong[0]} on the meta points to no line's start ({counts}): the bin has changed since"
    return Finding("meta-stale", path, message, *place)


def _wrong_offsets(
    path: str, lines: Lines, offsets: IntArray, wrong: IntArray, expected: IntArray
) -> Iterator[Finding]:
    """Single rows that point to no line's start."""
    for row in wrong[:MOST_OF_A_KIND].tolist():
        place = _place(lines, int(expected[row]))
        begins = "" if place[1] is None else f", the line begins at {place[1]}"
        yield Finding("meta-offset", path, f"meta row {row} says byte {offsets[row]}{begins}", *place)
    yield from the_rest("meta-offset", path, len(wrong) - MOST_OF_A_KIND)


def _wrong_lengths(
    path: str, lines: Lines, lengths: IntArray, owner: IntArray, right: npt.NDArray[np.bool_]
) -> Iterator[Finding]:
    """Rows of the right place with a wrong number of tokens."""
    wrong = np.flatnonzero(right & (lengths != lines.lengths[owner])) if len(lines) else owner[:0]
    row_of = dict(zip(owner[wrong].tolist(), wrong.tolist()))

    def says(line: int) -> str:
        return f"meta row {row_of[line]} says {lengths[row_of[line]]} tokens, the line has {lines.lengths[line]}"

    yield from at_rows("meta-length", path, lines, owner[wrong], says)


def _missing_rows(path: str, lines: Lines, offsets: IntArray, owner: IntArray) -> Iterator[Finding]:
    """Lines without a row, or with two; rows in another order."""
    counts = f"the meta has {len(offsets)} rows, the bin {len(lines)} samples"
    owned = np.bincount(owner, minlength=len(lines))
    missing = np.flatnonzero(owned == 0)
    if len(missing):
        first = int(missing[0])
        grown = len(missing) == len(lines) - first
        why = "the bin has grown since the meta was written" if grown else f"{len(missing)} lines have no row"
        yield Finding("meta-stale", path, f"{counts}: {why}", *_place(lines, first))
    elif (owned > 1).any():
        yield Finding("meta-stale", path, f"{counts}: two rows for a line", *_place(lines, int(np.argmax(owned > 1))))
    elif (np.diff(owner) < 0).any():
        first = int(np.argmax(owner != np.arange(len(owner))))
        yield Finding("meta-order", path, f"meta row {first} belongs to another line", *_place(lines, first))


def _place(lines: Lines, row: int) -> tuple[int | None, int | None]:
    """Line and offset of a sample; none behind the last."""
    return (lines.line(row), int(lines.offsets[row])) if row < len(lines) else (None, None)


def _within_bad_lines(lines: Lines, offsets: IntArray) -> npt.NDArray[np.bool_]:
    if not lines.num_bad:
        return np.zeros(len(offsets), dtype=bool)
    owner = np.searchsorted(lines.bad_begins, offsets, side="right") - 1
    within: npt.NDArray[np.bool_] = (owner >= 0) & (offsets < lines.bad_ends[owner])
    return within
