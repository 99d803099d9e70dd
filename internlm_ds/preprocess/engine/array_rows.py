"""Rows by numpy and Python: the same cuts and cached segments as the kernel's, to be read, and to fall back on.

Segments that were not met before go to sentencepiece, all of a block in one call. Nothing is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from internlm_ds.preprocess.engine.tables import Array, Tables, user_pieces
from internlm_ds.preprocess.rows import Rows, TextBlock
from internlm_ds.preprocess.tokenizers import Encoder

_MAX_SEGMENTS = 1 << 18
_LINE_BEGIN, _LINE_END = '{"tokens": [', "]}\n"


class ArrayRows:
    """`RowEncoder` over a cut made with arrays.

    Args:
        tables: Of the model.
        encoder: Ids of segments that are new.
        before, behind: Ids put before and behind each sample.
        max_segments: Finished segments that are kept; a full cache is emptied.
    """

    engine = "arrays"

    def __init__(
        self,
        tables: Tables,
        encoder: Encoder,
        *,
        before: Sequence[int] = (),
        behind: Sequence[int] = (),
        max_segments: int = _MAX_SEGMENTS,
    ):
        self._classes, self._joins = tables.classes, np.unpackbits(tables.joins, bitorder="little")
        longest_first = sorted(user_pieces(tables), key=len, reverse=True)
        self._user_pieces = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._encoder = encoder
        self._before, self._behind = list(before), list(behind)
        self._max_segments = max_segments
        self._cache: dict[str, tuple[str, int, int]] = {}

    def encode(self, block: TextBlock) -> Rows:
        """Rows of a block."""
        text = bytes(block.text).decode()
        begins, ends = _in_characters(block)
        cuts = self._cuts(text, begins, ends)
        places = cuts.tolist()
        segments = [text[a:b] for a, b in pairwise(places)]
        finished = self._finished(segments)
        first, last = np.searchsorted(cuts, begins).tolist(), np.searchsorted(cuts, ends).tolist()
        rows = [self._row([finished[s] for s in segments[a:b]]) for a, b in zip(first, last)]
        return Rows(
            data="".join([row[0] for row in rows]).encode("ascii"),
            sizes=np.array([len(row[0]) for row in rows], dtype=np.int64),
            lengths=np.array([row[1] for row in rows], dtype=np.int64),
            largest_id=max((row[2] for row in rows), default=-1),
        )

    def _cuts(self, text: str, begins: Array, ends: Array) -> Array:
        """Character positions between which a segment lies, rising; every text's begin and end is among them."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)
        words = self._classes[np.minimum(codes, len(self._classes) - 1)]
        words[codes >= len(self._classes)] = 0
        rows, columns = (words >> 32) & 0x7FFFFFFF, words & 0xFFFFFFFF
        is_cut = np.ones(len(codes) + 1, dtype=np.bool_)
        is_cut[1:-1] = self._joins[rows[:-1] + columns[1:]] == 0
        for begin, end in self._matches(text, begins, ends):
            is_cut[begin : end + 1] = False
            is_cut[[begin, end]] = True
        is_cut[begins] = is_cut[ends] = True
        return np.flatnonzero(is_cut)

    def _matches(self, text: str, begins: Array, ends: Array) -> list[tuple[int, int]]:
        """Where user-defined pieces stand; a match never leaves its text."""
        if not self._user_pieces.search(text):
            return []
        spans = zip(begins.tolist(), ends.tolist())
        return [match.span() for begin, end in spans for match in self._user_pieces.finditer(text, begin, end)]

    def _finished(self, segments: list[str]) -> dict[str, tuple[str, int, int]]:
        """Text of the ids, their number and the largest, of each segment. Several threads may do this at once."""
        cache = self._cache
        if len(cache) > self._max_segments:
            cache = self._cache = {}
        new = list(dict.fromkeys(segment for segment in segments if segment not in cache))
        for segment, ids in zip(new, self._encoder.encode(new) if new else []):
            cache[segment] = (", ".join(map(str, ids)), len(ids), max(ids, default=-1))
        return cache

    def _row(self, parts: list[tuple[str, int, int]]) -> tuple[str, int, int]:
        """A line, its tokens, and its largest id."""
        fixed = [*self._before, *self._behind]
        texts = [*map(str, self._before), *(part[0] for part in parts), *map(str, self._behind)]
        line = _LINE_BEGIN + ", ".join([text for text in texts if text]) + _LINE_END
        largest = max([*fixed, *(part[2] for part in parts)], default=-1)
        return line, len(fixed) + sum(part[1] for part in parts), largest


def _in_characters(block: TextBlock) -> tuple[Array, Array]:
    """The block's borders, counted in characters instead of bytes."""
    content = np.frombuffer(block.text, dtype=np.uint8)
    before = np.zeros(len(content) + 1, dtype=np.int64)
    np.cumsum((content & 0xC0) != 0x80, out=before[1:])
    return before[block.begins], before[block.ends]
