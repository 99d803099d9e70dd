"""Compiled loops of the loader: rows of digits to numbers, samples to a micro-batch.

Import this through `kernels` only: it imports numba and compiles. Each function has its readable twin in numpy
(`bintext.BinText.read`, `packing` with `collate`), which is the oracle of its tests. They release the GIL, allocate
nothing, and have fixed argument types, so they are compiled once per machine and never at a call.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

_HEAD = np.frombuffer(b'{"tokens": [', dtype=np.uint8)
_HEAD_SIZE, _SHORTEST = 12, 14  # of an empty row: the head and `]}`
_NEWLINE, _BLANK, _COMMA, _MINUS, _ZERO, _BRACKET, _BRACE = 10, 32, 44, 45, 48, 93, 125
_MOST_DIGITS = 18  # the largest number of which every value fits int64
_IGNORED = -100  # `packing.IGNORED`; from there it would be a circle of imports

_text = types.Array(types.uint8, 1, "C", readonly=True)
_given_int64s = types.Array(types.int64, 1, "C", readonly=True)  # may be mapped
_int64s = types.Array(types.int64, 1, "C")
_int32s = types.Array(types.int32, 1, "C")


@njit(types.int64(_text, _given_int64s, _given_int64s, types.int64, _int64s), nogil=True, cache=True)  # type: ignore[untyped-decorator]
def parse_rows(
    text: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    vocab_size: int,
    out: np.ndarray,
) -> int:
    """Parse rows of a bin into `out`, one behind the other.

    Args:
        text: The whole bin.
        offsets, lengths: Of each row, as the meta has them.
        vocab_size: Absolute values must be below it; 0 leaves them unchecked.
        out: int64 `(sum(lengths),)`.
    Returns:
        The number of rows, or that of the first row which is not the usual line `{"tokens": [1, -2]}` of as many
        tokens as the meta says: damaged, or JSON of another look. Then `out` is half written.

    No index is checked against the end of the text but at a row's start: the last byte is no digit, blank, comma or
    sign, so no loop runs past it.
    """
    size = text.size
    if size == 0 or (text[size - 1] != _NEWLINE and text[size - 1] != _BRACE):
        return 0
    to = 0
    for row in range(offsets.size):
        at = offsets[row]
        if at < 0 or at + _SHORTEST > size or (at > 0 and text[at - 1] != _NEWLINE):
            return row
        for place in range(_HEAD_SIZE):
            if text[at + place] != _HEAD[place]:
                return row
        at += _HEAD_SIZE
        for index in range(lengths[row]):
            if index > 0:
                if text[at] != _COMMA:
                    return row
                at += 1
                if text[at] == _BLANK:
                    at += 1
            negative = text[at] == _MINUS
            if negative:
                at += 1
            first = at
            value = np.int64(0)
            digit = np.int64(text[at]) - _ZERO
            while 0 <= digit <= 9:
                value = 10 * value + digit
                at += 1
                digit = np.int64(text[at]) - _ZERO
            digits = at - first
            # JSON knows no numbers such as 007; a number too long has overflowed
            if digits == 0 or digits > _MOST_DIGITS or (digits > 1 and text[first] == _ZERO):
                return row
            if vocab_size > 0 and value >= vocab_size:
                return row
            out[to] = -value if negative else value
            to += 1
        if text[at] != _BRACKET or text[at + 1] != _BRACE:
            return row
        if at + 2 < size and text[at + 2] != _NEWLINE:
            return row
    return offsets.size


@njit(  # type: ignore[untyped-decorator]
    types.UniTuple(types.int64, 2)(
        _given_int64s,
        _given_int64s,
        types.int64,
        types.int64,
        types.boolean,
        types.int64,
        _int64s,
        _int32s,
        _int64s,
        _int64s,
    ),
    nogil=True,
    cache=True,
)
def lay_out(
    signed: np.ndarray,
    lengths: np.ndarray,
    skip: int,
    seq_len: int,
    fixed: bool,
    type_id: int,
    tokens: np.ndarray,
    cu_seqlens: np.ndarray,
    labels: np.ndarray,
    type_ids: np.ndarray,
) -> tuple[int, int]:
    """Whole samples to one packed micro-batch: what `packing`'s packers and `collate.micro_batch_arrays` do together.

    Args:
        signed: Tokens of the samples behind one another, signed as on disk.
        lengths: Of each sample.
        skip: Tokens of the first sample that belong to an earlier pack.
        seq_len: Longest segment.
        fixed: Segments of `seq_len` whatever the samples, no label behind a cut (`FixedSegmentPacker`).
        type_id: Type of all tokens.
        tokens, cu_seqlens, labels, type_ids: Filled; see `collate.MicroBatchArrays`.
    Returns:
        Number of segments, tokens of the longest.
    """
    total = tokens.size
    at, source, segments, longest = 0, skip, 0, 0
    cu_seqlens[0] = 0
    for sample in range(lengths.size):
        rest = lengths[sample] - skip if sample == 0 else lengths[sample]
        take = min(rest, total - at)
        if take > 0:
            for place in range(take):
                tokens[at + place] = abs(signed[source + place])
            for place in range(take - 1):
                following = signed[source + place + 1]
                labels[at + place] = following if following > 0 else _IGNORED
            behind = signed[source + take] if not fixed and take < rest else 0
            labels[at + take - 1] = behind if behind > 0 else _IGNORED
            if not fixed:
                for border in range(seq_len, take, seq_len):
                    segments += 1
                    cu_seqlens[segments] = at + border
                segments += 1
                cu_seqlens[segments] = at + take
                longest = max(longest, min(take, seq_len))
            at += take
        source += rest
    if fixed:
        longest = seq_len
        for border in range(seq_len, total + 1, seq_len):
            segments += 1
            cu_seqlens[segments] = border
    for place in range(segments + 1, total + 1):
        cu_seqlens[place] = total
    for place in range(total):
        type_ids[place] = type_id
    return segments, longest
