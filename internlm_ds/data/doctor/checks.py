"""The examination of bins: everything `internlm-ds data check` looks for, file by file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from internlm_ds.data.doctor.findings import Finding
from internlm_ds.data.doctor.lines import Lines, scan_plainly
from internlm_ds.data.doctor.pairing import check_meta


@dataclass(frozen=True)
class Examined:
    """What a bin holds and what is wrong with it."""

    path: str
    samples: int
    tokens: int
    num_bytes: int
    findings: tuple[Finding, ...]


def examine(path: str, *, vocab_size: int | None = None) -> Examined:
    """Look at one bin and what lies beside it.

    Args:
        vocab_size: Ids must be below it; None leaves them unchecked.
    """
    try:
        lines = scan_plainly(path)
    except OSError as error:
        return Examined(path, 0, 0, 0, (Finding("unreadable", path, error.strerror or str(error)),))
    findings = [*_bad_lines(path, lines), *check_meta(path, lines), *_bad_samples(path, lines, vocab_size)]
    return Examined(path, len(lines), int(lines.lengths.sum()), lines.size, tuple(findings))


def _bad_lines(path: str, lines: Lines) -> Iterator[Finding]:
    torn = 0 if lines.has_end else lines.num_lines
    for bad in lines.bad:
        if bad.line != torn:
            yield Finding("damaged-line", path, bad.message, bad.line, bad.offset_bytes)
    if torn:
        last = lines.bad[-1] if lines.bad and lines.bad[-1].line == torn else None
        message = last.message if last else "the last sample is whole but has no newline behind it"
        yield Finding("torn-tail", path, message, torn, last.offset_bytes if last else int(lines.offsets[-1]))


def _bad_samples(path: str, lines: Lines, vocab_size: int | None) -> Iterator[Finding]:
    if vocab_size is not None:
        for row in np.flatnonzero(lines.largest >= vocab_size):
            message = f"id {lines.largest[row]} where the vocabulary ends at {vocab_size - 1}"
            yield Finding("id-range", path, message, int(lines.numbers[row]), int(lines.offsets[row]))
    for row in np.flatnonzero((lines.learned == 0) & (lines.lengths > 1)):
        message = f"none of its {lines.lengths[row]} tokens is learned"
        yield Finding("all-masked", path, message, int(lines.numbers[row]), int(lines.offsets[row]))
