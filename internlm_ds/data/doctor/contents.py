"""What the samples of a bin say: ids that do not exist, nothing to learn, too short, there twice, JSON syntax."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.doctor.findings import Finding, at_rows
from internlm_ds.data.doctor.lines import DigestArray, Lines
from internlm_ds.data.doctor.repeats import Repeat, find_repeat
from internlm_ds.data.doctor.rows import opened_rows, spread_rows

LONG_BIN = 200_000
"""From so many samples on repeats are looked for by compiled code."""

SAMPLES_READ = 256
FEWEST_ALIKE = 8
IDS_ALIKE = 3
BOS = 1
JSON_START = re.compile(r'^\s*\{\s*"(?:[^"\\]|\\.){1,64}"\s*:')
# `{"` and `":` or `":"` in both of InternLM's models, of 2023 and of InternLM2
INTERNLM_OPEN, INTERNLM_COLONS = 5071, (921, 3415)


def check_ids(path: str, lines: Lines, vocab_size: int, *, origin: str) -> Iterator[Finding]:
    """Samples with ids at or above `vocab_size`; `origin` says where that number comes from."""
    rows = np.flatnonzero(lines.largest >= vocab_size)
    if not len(rows):
        return
    with opened_rows(path, lines) as tokens_of:

        def message(row: int) -> str:
            tokens = tokens_of(row)
            at = int(np.flatnonzero(np.abs(tokens) >= vocab_size)[0])
            return f"token {at} of {len(tokens)} is id {tokens[at]}; ids end at {vocab_size - 1} ({origin})"

        yield from at_rows("id-range", path, lines, rows, message)


def check_learning(path: str, lines: Lines) -> Iterator[Finding]:
    """Samples that teach nothing: no tokens, or no target among them.

    A single unmasked token is no fault: there is nothing behind it to be masked.
    """
    empty = np.flatnonzero(lines.lengths == 0)
    yield from at_rows("empty-sample", path, lines, empty, lambda row: "no tokens")
    masked = np.flatnonzero((lines.learned == 0) & (lines.lengths > 1))
    yield from at_rows(
        "all-masked", path, lines, masked, lambda row: f"none of its {lines.lengths[row]} tokens is learned"
    )


def check_lengths(path: str, lines: Lines, min_length: int, *, wanted: bool) -> Iterator[Finding]:
    """Samples below `min_length`.

    Args:
        wanted: All samples shall be that long (`--min-length`), so each is a fault; else training leaves them out
            (`data.min_length`), which is worth one line.
    """
    short = np.flatnonzero(lines.lengths < min_length)
    if wanted:
        message = f"fewer than {min_length}"
        yield from at_rows("short", path, lines, short, lambda row: f"{lines.lengths[row]} tokens, {message}")
    elif len(short) and len(short) == len(lines):
        yield Finding("all-dropped", path, f"none of its {len(lines)} samples has {min_length} tokens")
    elif len(short):
        tokens = f"{lines.lengths[short].sum()} tokens"
        message = f"{len(short)} of {len(lines)} samples ({tokens}) are shorter than {min_length} tokens"
        yield Finding("dropped", path, message)


def check_repeats(path: str, lines: Lines) -> Iterator[Finding]:
    """The same samples once more at the end of the bin."""
    found = repeat_in(lines.digests)
    if found is None:
        return
    first, source = lines.line(found.first), lines.line(found.source)
    number = len(lines) - found.first
    if found.times > 1 and found.times * found.first == len(lines):
        message = f"the bin holds its first {found.first} samples {found.times} times"
    else:
        message = f"the last {number} samples are those from line {source} on once more"
    yield Finding("doubled", path, message, first, int(lines.offsets[found.first]))


def repeat_in(digests: DigestArray) -> Repeat | None:
    """`find_repeat`, compiled where that pays."""
    kernels: Any = None
    if len(digests) >= LONG_BIN:
        with contextlib.suppress(ImportError):
            from internlm_ds.data.doctor import kernel as kernels
    return find_repeat(digests, kernels=kernels)


def check_syntax(path: str, lines: Lines, decode: Callable[[Sequence[int]], str] | None) -> Iterator[Finding]:
    """JSON records that were tokenized as text.

    Args:
        decode: Ids to text, of the tokenizer that was used; None: what can be told from ids alone.
    """
    rows = [row for row in spread_rows(len(lines), SAMPLES_READ) if lines.lengths[row] > IDS_ALIKE + 1]
    with opened_rows(path, lines) as tokens_of:
        samples = [tokens_of(row) for row in rows]
    like_json = [row for row, tokens in zip(rows, samples) if _is_json(tokens, decode)]
    if len(like_json) * 2 > len(samples):
        message = f'{len(like_json)} of {len(samples)} samples looked at begin like {{"text": '
        yield Finding("json-syntax", path, message, lines.line(like_json[0]), int(lines.offsets[like_json[0]]))
    elif decode is None and (start := _common_start(samples)):
        message = f"all {len(samples)} samples looked at begin with {start}"
        yield Finding("same-start", path, message, lines.line(rows[0]), int(lines.offsets[rows[0]]))


def _is_json(tokens: IntArray, decode: Callable[[Sequence[int]], str] | None) -> bool:
    ids = tokens[:24].tolist()
    if ids[0] == BOS:
        ids = ids[1:]
    if decode is None:
        return ids[0] == INTERNLM_OPEN and any(colon in ids[2:6] for colon in INTERNLM_COLONS)
    return min(ids) >= 0 and JSON_START.match(decode(ids)) is not None


def _common_start(samples: Sequence[IntArray]) -> list[int]:
    """Ids that all these samples begin with, bos apart; empty if they are few, masked, or the samples are equal."""
    if len({sample.tobytes() for sample in samples}) < FEWEST_ALIKE:
        return []
    shortest = min(len(sample) for sample in samples)
    starts = np.stack([sample[:shortest] for sample in samples])
    alike = (starts == starts[0]).all(axis=0)
    start: list[int] = starts[0][: int(np.argmin(alike)) if not alike.all() else shortest].tolist()
    bare = start[1:] if start[:1] == [BOS] else start
    return start if len(bare) >= IDS_ALIKE and min(bare) > 0 else []
