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

from internlm_ds.preprocess.engine.memory import byte_at, numbers_at, put_word, word_at
from internlm_ds.preprocess.engine.merging import Places, Scratch, code_at, inner, outer, user_piece
from internlm_ds.preprocess.engine.segments import SHORT, Cache, copy_words, long_segment, short_segment

DONE, LEFTOVER, GROW = 0, 1, 2
MAX_SEGMENT = 512  # bytes
SLACK = 64  # bytes that may be read or written behind a buffer's end
MAX_FINISHED = 8 * MAX_SEGMENT

_MASK32 = 0xFFFFFFFF
_ROW_MASK = 0x7FFFFFFF


class Call(NamedTuple):
    """One call: addresses and sizes of text, borders (int64 each), room for rows and for their sizes and lengths.

    Attributes:
        frame, tables, cache, scratch, state: Addresses of such tuples, as int64 numbers.
        capacity: Bytes of `out` that may be filled; `SLACK` more can be written.
    """

    text: int
    text_size: int
    begins: int
    ends: int
    num_texts: int
    out: int
    capacity: int
    sizes: int
    lengths: int
    frame: int
    tables: int
    cache: int
    scratch: int
    state: int


class State(NamedTuple):
    """Where a call goes on: text, place in it (-1: at its begin), bytes out; the row's begin and tokens; largest id.

    `segment_end` is the end of a leftover that begins at `place`.
    """

    text: int = 0
    place: int = -1
    out: int = 0
    row: int = 0
    tokens: int = 0
    largest: int = -1
    segment_end: int = 0


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
def _encode(job):
    """See `encode_block`."""
    call = numbers_at(job, 0, Call)
    frame, tables = numbers_at(call.frame, 0, Frame), numbers_at(call.tables, 0, Places)
    cache, scratch = numbers_at(call.cache, 0, Cache), numbers_at(call.scratch, 0, Scratch)
    text, out = call.text, call.out
    state = numbers_at(call.state, 0, State)
    p, o, row, tokens, largest = state.place, state.out, state.row, state.tokens, state.largest
    for i in range(state.text, call.num_texts):
        end = word_at(call.ends, i << 3)
        code = DONE
        if p < 0:
            if o + frame.before_size + frame.behind_size + SLACK > call.capacity:
                return _stopped(GROW, call.state, i, p, o, row, tokens, largest, end)
            p, row = word_at(call.begins, i << 3), o
            copy_words(frame.before, frame.before_size, out + o)
            o, tokens = o + frame.before_size, frame.tokens
        word, size = 0, 1
        if p < end:
            word, size = _class_at(text, p, tables)
        while p < end:
            q, word, size = _segment_end(text, p, end, word, size, tables)
            if byte_at(text, p) == 0 or q - p > MAX_SEGMENT:
                code = LEFTOVER
            elif o + MAX_FINISHED + frame.behind_size + SLACK > call.capacity:
                code = GROW
            if code != DONE:
                return _stopped(code, call.state, i, p, o, row, tokens, largest, q)
            if q - p <= SHORT:
                finished, facts = short_segment(text, p, q, call.text_size, tables, cache, scratch)
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
        put_word(call.sizes, i << 3, o - row)
        put_word(call.lengths, i << 3, tokens)
        p = -1
    return _stopped(DONE, call.state, call.num_texts, p, o, row, tokens, largest, 0)


@inner
def _stopped(code, state, text, place, out, row, tokens, largest, segment_end):
    put_word(state, 0, text)
    put_word(state, 8, place)
    put_word(state, 16, out)
    put_word(state, 24, row)
    put_word(state, 32, tokens)
    put_word(state, 40, largest)
    put_word(state, 48, segment_end)
    return code


def digest_of_sources() -> bytes:
    """Changes when the compiled code may."""
    names = ("kernel", "memory", "merging", "segments", "tables")
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"".join(sources)).digest()


@cache
def encode_block() -> Any:
    """The compiled loop: takes the address of a `Call`, returns why it stopped. numba keeps its code on disk."""
    # numba looks at this file's time only and would keep code of older helpers
    stamp = int.from_bytes(digest_of_sources()[:4], "little")

    @njit("int64(int64)", nogil=True, cache=True, error_model="numpy")
    def encode_block(job):
        return _encode(job) if stamp >= 0 else -1

    return encode_block
