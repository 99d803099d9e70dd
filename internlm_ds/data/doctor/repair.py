"""A sound copy of a bin that is not sound: which samples stay, what the copy's meta and note say.

The file itself is never touched. What no copy can mend (samples that teach nothing, ids beyond the vocabulary) stays
unless it is to be dropped, and is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray, Writer
from internlm_ds.data.doctor import contents, notes, pairing
from internlm_ds.data.doctor.lines import Lines, decode_odd_line
from internlm_ds.errors import DataFormatError

DROPPABLE = ("all-masked", "empty-sample", "id-range", "short")

_BLOCK_BYTES = 1 << 22

RowMask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Repaired:
    """A copy that was written.

    Attributes:
        did: What differs from the original, in words; empty for a plain copy.
        samples, tokens: What the copy holds.
    """

    path: str
    output: str
    did: tuple[str, ...]
    samples: int
    tokens: int


def repair(
    path: str,
    output: str,
    lines: Lines,
    *,
    drop: Collection[str] = (),
    vocab_size: int | None = None,
    min_length: int = 0,
    overwrite: bool = False,
) -> Repaired:
    """Write the samples of `path` that can stay to `output`, with a fresh meta, and a note if there was one.

    Args:
        lines: What `scan.scan_bins` found in `path`.
        drop: Kinds of `DROPPABLE` to leave out as well; "id-range" needs `vocab_size`, "short" `min_length`.
        overwrite: Replace an existing output.
    Raises:
        DataFormatError: There is no sample to copy; the output exists or cannot be written.
    """
    if lines.num_bad and not len(lines):
        message = f"none of its {lines.num_bad} lines holds a sample ({lines.bad[0].message}): there is nothing to copy"
        raise DataFormatError(message, path=path)
    keep, did = _chosen(lines, drop=drop, vocab_size=vocab_size, min_length=min_length)
    did = [*_what_is_cut(lines), *_what_is_said_of_the_meta(path, lines), *did]
    with Writer(output, overwrite=overwrite) as writer:
        if lines.odd:
            _rewrite(path, lines, keep, writer)
        else:
            _copy(path, lines, keep, writer)
        samples, tokens, num_bytes = writer.num_samples, writer.num_tokens, writer.num_bytes
        note, wrong = notes.read_note(path)
        if wrong:
            did.append("its note of origin, which could not be read, is left out")
        if note:
            largest = int(lines.largest[keep].max(initial=0))
            counts = {"samples": samples, "tokens": tokens, "bytes": num_bytes, "largest_id": largest}
            writer.put_beside(".json", _noted(note, counts, path, did))
    return Repaired(path, output, tuple(did), samples, tokens)


def outputs_of(paths: Sequence[str], bins: Sequence[Sequence[str]], output: str) -> list[tuple[str, str]]:
    """(bin, its copy): one bin to a file or into a folder, folders to folders with the same names inside.

    Args:
        paths: What the user named.
        bins: The bins of each.

    >>> outputs_of(["set"], [["set/en/a.bin"]], "new")
    [('set/en/a.bin', 'new/en/a.bin')]
    """
    if bins == [paths] and not output.endswith(os.sep) and not os.path.isdir(output):
        return [(paths[0], output)]
    return [
        (one, os.path.join(output, os.path.relpath(one, path) if one != path else os.path.basename(one)))
        for path, below in zip(paths, bins)
        for one in below
    ]


def _chosen(
    lines: Lines, *, drop: Collection[str], vocab_size: int | None, min_length: int
) -> tuple[RowMask, list[str]]:
    """Samples that stay, and what is said of those that do not."""
    wrong: dict[str, RowMask] = {
        "all-masked": (lines.learned == 0) & (lines.lengths > 1),
        "empty-sample": lines.lengths == 0,
        "id-range": lines.largest >= (np.inf if vocab_size is None else vocab_size),
        "short": lines.lengths < min_length,
    }
    keep, did = np.ones(len(lines), dtype=bool), []
    for kind in DROPPABLE:
        if kind in drop and (gone := int((wrong[kind] & keep).sum())):
            keep &= ~wrong[kind]
            did.append(f"{_samples(gone)} left out ({kind})")
    # one repetition may hide another: a file that was appended to three times, or after a shorter run
    while (found := contents.repeat_in(lines.digests[keep])) is not None:
        kept = np.flatnonzero(keep)
        keep[kept[found.first :]] = False
        did.append(
            f"{_samples(len(kept) - found.first)} left out: a second run's, from line {lines.line(kept[found.first])}"
        )
    return keep, did


def _what_is_cut(lines: Lines) -> Iterator[str]:
    torn = lines.num_bad > 0 and not lines.has_end and lines.bad_ends[-1] == lines.size
    if torn:
        yield f"the torn tail is cut off, {lines.size - lines.bad_begins[-1]} bytes from byte {lines.bad_begins[-1]}"
    if damaged := lines.num_bad - torn:
        yield f"{damaged} damaged line{'s' if damaged > 1 else ''} left out, the first is line {lines.bad[0].line}"
    if lines.odd:
        yield f"{lines.odd} of {lines.num_lines} lines written as lines of a bin are (ends, blanks, order marks)"


def _what_is_said_of_the_meta(path: str, lines: Lines) -> Iterator[str]:
    if any(pairing.check_meta(path, lines)):
        yield "the meta is made anew"


def _copy(path: str, lines: Lines, keep: RowMask, writer: Writer) -> None:
    """The lines that stay as they are, in runs."""
    begins, ends, lengths = lines.offsets[keep], lines.ends[keep], lines.lengths[keep]
    with open(path, "rb") as file:
        for low, high in _runs(begins, ends):
            file.seek(int(begins[low]))
            data = file.read(int(ends[high - 1] - begins[low]))
            writer.write_rows(data, ends[low:high] - begins[low:high], lengths[low:high])


def _runs(begins: IntArray, ends: IntArray) -> Iterator[tuple[int, int]]:
    """(from, to) of samples that lie behind one another, a few megabytes at most."""
    breaks = np.flatnonzero(begins[1:] != ends[:-1]) + 1
    edges = [0, *breaks.tolist(), len(begins)]
    for low, high in pairwise(edges):
        while low < high:
            reach = int(np.searchsorted(ends[low:high], begins[low] + _BLOCK_BYTES, side="right")) + low
            reach = max(reach, low + 1)
            yield low, reach
            low = reach


def _rewrite(path: str, lines: Lines, keep: RowMask, writer: Writer) -> None:
    """The samples that stay, written anew."""
    with open(path, "rb") as file:
        for row in np.flatnonzero(keep).tolist():
            file.seek(int(lines.offsets[row]))
            writer.write(decode_odd_line(file.readline()).tolist())


def _noted(note: Any, counts: dict[str, int], path: str, did: Sequence[str]) -> bytes:
    """The note with the copy's counts, and what happened."""
    record = {**note, "counts": {**note["counts"], **counts}}
    if did:
        record["repaired"] = [*note.get("repaired", []), {"from": path, "did": list(did)}]
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")


def _samples(number: int) -> str:
    return f"{number} sample{'s' if number > 1 else ''}"
