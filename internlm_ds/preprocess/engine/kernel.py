"""The compiled loop: texts of a block in, their rows out, through a cache of finished segments.

A segment is a stretch of text between two cuts (see `tables`); its ids depend on nothing outside it. Segments repeat,
so the finished text of their ids, `"12, 345, "`, is kept and a row is made by copying. Three ends of a call: `DONE`;
`LEFTOVER`, a segment that is not ours (NUL, or over-long), for the caller to append before it calls again; `GROW`, the
output is too small. The loop continues where it was. Imports numba: only `fast_rows` imports this.

Everything is int64: shifts to the right drag the sign in and are masked.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from numba import njit

from internlm_ds.preprocess.engine.memory import byte_at, put_word, word_at
from internlm_ds.preprocess.engine.merging import code_at, inner, outer, user_piece
from internlm_ds.preprocess.engine.segments import SHORT, copy_words, long_segment, short_segment

DONE, LEFTOVER, GROW = 0, 1, 2
MAX_SEGMENT = 512  # bytes
SLACK = 64  # bytes that may be read or written behind a buffer's end
MAX_FINISHED = 8 * MAX_SEGMENT

# fields of `state`
TEXT, PLACE, OUT, ROW, TOKENS, LARGEST, SEGMENT_END, STAMP = range(8)
_MASK32 = 0xFFFFFFFF
_ROW_MASK = 0x7FFFFFFF


class Frame(NamedTuple):
    """What stands around the ids of a row: bytes before and behind (address, size), their tokens and largest id."""

    before: int
    before_size: int
    behind: int
    behind_size: int
    tokens: int
    largest: int


@inner
def _class_at(text, p, tables):
    """Class word and bytes of the character at `p`."""
    c = byte_at(text, p)
    if c < 0x80:
        return word_at(tables.classes, c << 3), 1
    code, size = code_at(text, p)
    if code < tables.num_codes:
        return word_at(tables.classes, code << 3), size
    return 0, size


@inner
def _segment_end(text, p, end, word, size, tables):
    """End of the segment that begins at `p` with a character of this class word and size, and what follows it."""
    q = p + size
    if word < 0:
        length, _ = user_piece(text, p, end, tables)
        if length > 0 or byte_at(text, p) == 0:
            q = p + max(length, 1)
            if q < end:
                word, size = _class_at(text, q, tables)
            return q, word, size
    while q < end:
        row = (word >> 32) & _ROW_MASK
        word, size = _class_at(text, q, tables)
        bit = row + (word & _MASK32)
        if not (byte_at(tables.joins, bit >> 3) >> (bit & 7)) & 1:
            break
        if word < 0 and user_piece(text, q, end, tables)[0] > 0:
            break
        q += size
    return q, word, size


@outer
def _encode(text, text_size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state):
    """See `encode_block`."""
    largest, o, row, tokens = state[LARGEST], state[OUT], state[ROW], state[TOKENS]
    p = state[PLACE]
    for i in range(state[TEXT], len(begins)):
        end = ends[i]
        if p < 0:
            if o + frame.before_size + frame.behind_size + SLACK > capacity:
                state[TEXT], state[PLACE], state[OUT], state[LARGEST] = i, p, o, largest
                return GROW
            p, row = begins[i], o
            copy_words(frame.before, frame.before_size, out + o)
            o, tokens = o + frame.before_size, frame.tokens
        word, size = 0, 1
        if p < end:
            word, size = _class_at(text, p, tables)
        while p < end:
            q, word, size = _segment_end(text, p, end, word, size, tables)
            code = DONE
            if byte_at(text, p) == 0 or q - p > MAX_SEGMENT:
                code = LEFTOVER
            elif o + MAX_FINISHED + frame.behind_size + SLACK > capacity:
                code = GROW
            if code != DONE:
                state[TEXT], state[PLACE], state[OUT], state[ROW], state[TOKENS] = i, p, o, row, tokens
                state[LARGEST], state[SEGMENT_END] = largest, q
                return code
            if q - p <= SHORT:
                finished, facts = short_segment(text, p, q, text_size, tables, cache, scratch)
            else:
                finished, facts = long_segment(text, p, q, tables, cache, scratch)
            count = facts & 0xFFFF
            put_word(out, o, word_at(finished, 0))  # most have no more than 16 bytes
            put_word(out, o + 8, word_at(finished, 8))
            if count > 16:
                copy_words(finished + 16, count - 16, out + o + 16)
            o += count
            tokens += (facts >> 16) & 0xFFFF
            largest = max(largest, facts >> 32)
            p = q
        copy_words(frame.behind, frame.behind_size, out + o)
        o += frame.behind_size
        if tokens > 0:
            largest = max(largest, frame.largest)
            o -= 2  # the last ", "
        put_word(out, o, 0x0A7D5D)  # "]}" and a line end
        o += 3
        sizes[i], lengths[i] = o - row, tokens
        p = -1
    state[OUT], state[LARGEST] = o, largest
    return DONE


@cache
def encode_block() -> Any:
    """The compiled loop; numba keeps its code on disk.

    It takes (text, text_size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state): text
    read-only bytes, begins and ends read-only, sizes and lengths int64 to be filled, `state` as the fields above say,
    PLACE -1 where no text is under way. `out` must hold `capacity` bytes and `SLACK` more.
    """
    # numba looks at this file's time only and would keep code of older helpers
    stamp = int.from_bytes(_digest_of_sources()[:4], "little")

    @njit(nogil=True, cache=True, error_model="numpy")
    def encode_block(text, size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state):
        state[STAMP] = stamp
        return _encode(text, size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state)

    return encode_block


def _digest_of_sources() -> bytes:
    sources = sorted(
        Path(__file__).with_name(f"{name}.py") for name in ("kernel", "memory", "merging", "segments", "tables")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()
