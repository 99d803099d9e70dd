"""Samples and batches for people to read: runs of learned and masked tokens, decoded, segment by segment.

A token counts as learned where it is a target: not masked on disk, not id 0, and with a token before it in its piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import IntArray, split_signed_tokens

Decode = Callable[[Sequence[int]], str]

INDENT = "    "


@dataclass(frozen=True)
class Run:
    """Tokens `[start, stop)` of a sample that are all learned, or all not, within one segment.

    Attributes:
        ids: Unsigned.
        segment: Number of the segment within its sample or micro-batch.
    """

    start: int
    stop: int
    segment: int
    learned: bool
    ids: tuple[int, ...]

    def as_json(self, decode: Decode | None) -> dict[str, Any]:
        """The run as plain data, with its text if there is a decoder, else with its ids."""
        shown = {"ids": list(self.ids)} if decode is None else {"text": decode(self.ids)}
        return {"start": self.start, "stop": self.stop, "segment": self.segment, "learned": self.learned, **shown}


def runs_of(tokens: IntArray, *, first: int = 0, borders: Sequence[int] = (), segment: int = 0) -> list[Run]:
    """The runs of a piece of a sample.

    Args:
        tokens: int64, signed as on disk.
        first: Place of the piece's first token in its sample.
        borders: Places in the piece where a new segment begins.
        segment: Number of the first.

    >>> [(run.start, run.stop, run.learned) for run in runs_of(np.array([1, -5, -6, 7, 8]))]
    [(0, 3, False), (3, 5, True)]
    """
    if not len(tokens):
        return []
    ids, learned = split_signed_tokens(tokens)
    learned = learned.copy()
    learned[0] = False
    inner = [border for border in borders if 0 < border < len(tokens)]
    edges = sorted({0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), *inner, len(tokens)})
    return [
        Run(
            first + low,
            first + high,
            segment + sum(border <= low for border in inner),
            bool(learned[low]),
            tuple(ids[low:high].tolist()),
        )
        for low, high in pairwise(edges)
    ]


def segment_starts(length: int, *, seq_len: int, place: int = 0, rows: bool = False) -> list[int]:
    """Where new segments begin in a piece: every `seq_len` tokens of its own, or of its micro-batch (`rows`).

    >>> segment_starts(10, seq_len=4), segment_starts(10, seq_len=4, place=6, rows=True)
    ([4, 8], [2, 6])
    """
    return list(range(seq_len - place % seq_len if rows else seq_len, length, seq_len))


def as_lines(
    runs: Sequence[Run], decode: Decode | None, *, limit: int | None = None, color: bool = False
) -> Iterator[str]:
    """A run to a paragraph: its place, whether it is learned, its text, or its ids without a decoder.

    Args:
        limit: Show so many tokens of a run, the rest as a number.
        color: Masked parts in grey, for a terminal.
    """
    segment = runs[0].segment if runs else 0
    for run in runs:
        if run.segment != segment:
            segment = run.segment
            yield f"  -- segment {segment}"
        ids = run.ids if limit is None else run.ids[:limit]
        text = " ".join(map(str, ids)) if decode is None else decode(ids)
        if len(ids) < len(run.ids):
            text += f" … {len(run.ids) - len(ids)} tokens more"
        yield f"  [{run.start}:{run.stop}] {'learned' if run.learned else 'masked'}"
        begin, end = ("\x1b[2m", "\x1b[0m") if color and not run.learned else ("", "")
        yield from (f"{INDENT}{begin}{line}{end}" for line in _visible_lines(text))


def piece_lines(tokens: IntArray, pieces: Sequence[str]) -> Iterator[str]:
    """One line a token: place, id as it stands on disk, whether it is learned, its text."""
    runs = runs_of(tokens)
    learned: npt.NDArray[np.bool_] = np.repeat([run.learned for run in runs], [run.stop - run.start for run in runs])
    for place, (number, text, is_target) in enumerate(zip(tokens.tolist(), pieces, learned)):
        yield f"  {place:>6}  {number:>8}  {'learned' if is_target else 'masked '}  {text!r}"


def _visible_lines(text: str) -> list[str]:
    """Lines of a text with a sign where one ends, so that a line end that is learned can be seen."""
    parts = text.split("\n")
    return [f"{part}⏎" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
