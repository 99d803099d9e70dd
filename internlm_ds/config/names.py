"""The nearest known name of a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable

CLOSE = 0.7
"""Likeness (difflib's ratio) from which a name counts as a misspelling of another."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = CLOSE) -> str | None:
    """The known name most like `name`, whatever its case; None when none is alike enough.

    >>> nearest("micro_nun", ["micro_num", "micro_bsz"])
    'micro_num'
    """
    # imported here: a file without mistakes never needs it
    from difflib import SequenceMatcher

    best, best_ratio = None, cutoff
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(name.lower())
    for candidate in known:
        matcher.set_seq1(candidate.lower())
        if matcher.real_quick_ratio() < best_ratio or matcher.quick_ratio() < best_ratio:
            continue
        ratio = matcher.ratio()
        if ratio > best_ratio or (best is None and ratio >= best_ratio):
            best, best_ratio = candidate, ratio
    return best
