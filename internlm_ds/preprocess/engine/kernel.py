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

from internlm_ds.preprocess.engine.memory import byte_at, put_byte, put_word, word_at
from internlm_ds.preprocess.engine.merging import code_at, finish, inner, outer, user_piece
from internlm_ds.preprocess.engine.tables import HASH_FACTOR

DONE, LEFTOVER, GROW = 0, 1, 2
MAX_SEGMENT = 512  # bytes
# a short segment, at most 16 bytes: its bytes, facts, then 40 bytes of finished text or its place in the pool
SHORT, SLOT, INLINE = 16, 64, 40
LONG_SLOT = 32  # hash, place and bytes of the segment in the pool, facts, place of the finished text
SLACK = 64  # bytes that may be read or written behind a buffer's end
MAX_FINISHED = 8 * MAX_SEGMENT

# fields of `state`
TEXT, PLACE, OUT, ROW, TOKENS, LARGEST, SEGMENT_END, STAMP = range(8)
# fields of `counters`
USED_SHORT, USED_LONG, USED_POOL = range(3)

_MASK32 = 0xFFFFFFFF
_ROW_MASK = 0x7FFFFFFF


class Cache(NamedTuple):
    """Addresses of the finished segments of one thread, their sizes (slots, bytes), and int64 `counters`."""

    short: int
    num_short: int
    long: int
    num_long: int
    pool: int
    pool_size: int
    counters: int


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
def _copy(source, begin, size, target, place):
    """Copy bytes in words; up to seven behind the end are written too."""
    for i in range(0, size, 8):
        put_word(target, place + i, word_at(source, begin + i))


@inner
def _careful_word(text, p, end):
    """Eight bytes from `p` on, zeros from `end` on."""
    word = shift = 0
    while p < end and shift < 64:
        word |= byte_at(text, p) << shift
        shift += 8
        p += 1
    return word


@outer
def _forget(cache):
    for i in range(0, cache.num_short * SLOT, 8):
        put_word(cache.short, i, 0)
    for i in range(0, cache.num_long * LONG_SLOT, 8):
        put_word(cache.long, i, 0)
    for i in range(3):
        put_word(cache.counters, i << 3, 0)


@inner
def _counted(cache, field, more):
    """Raise a counter; returns what it was."""
    before = word_at(cache.counters, field << 3)
    put_word(cache.counters, field << 3, before + more)
    return before


@outer
def _new_short(text, begin, end, slot, tables, cache, scratch):
    """Encode a short segment into its slot. False: there was no room, the cache is empty now."""
    facts = finish(text, begin, end, tables, scratch)
    size = facts & 0xFFFF
    used, place = word_at(cache.counters, USED_SHORT << 3), word_at(cache.counters, USED_POOL << 3)
    if used > cache.num_short - cache.num_short // 4 or place + size + SLACK > cache.pool_size:
        _forget(cache)
        return False
    if size <= INLINE:
        for i in range(0, INLINE, 8):
            put_word(cache.short, slot + 24 + i, word_at(scratch.finished, i))
    else:
        put_word(cache.short, slot + 24, place)
        _copy(scratch.finished, 0, size, cache.pool, place)
        _counted(cache, USED_POOL, (size + 7) & ~7)
    put_word(cache.short, slot + 16, facts)
    _counted(cache, USED_SHORT, 1)
    return True


@inner
def _long_hash(text, begin, end):
    mixed = end - begin
    for p in range(begin, end - 8, 8):
        mixed = (mixed ^ word_at(text, p)) * HASH_FACTOR
        mixed ^= (mixed >> 32) & _MASK32
    mixed = (mixed ^ word_at(text, end - 8)) * HASH_FACTOR
    return (mixed ^ ((mixed >> 32) & _MASK32)) | 1  # never 0: that is an empty slot


@inner
def _same(text, begin, size, pool, place):
    """Whether a segment of more than eight bytes is the one that lies in the pool."""
    for i in range(0, size - 8, 8):
        if word_at(text, begin + i) != word_at(pool, place + i):
            return False
    return word_at(text, begin + size - 8) == word_at(pool, place + size - 8)


@outer
def _long_slot(text, begin, end, tables, cache, scratch):
    """Place in `cache.long` of a segment of more than `SHORT` bytes, encoded if it was not there."""
    size = end - begin
    mixed = _long_hash(text, begin, end)
    while True:
        index = (mixed >> 24) & (cache.num_long - 1)
        while True:
            slot = index * LONG_SLOT
            known = word_at(cache.long, slot)
            if known == 0:
                break
            key = word_at(cache.long, slot + 8)
            if known == mixed and key & 0xFFFF == size and _same(text, begin, size, cache.pool, key >> 16):
                return slot
            index = (index + 1) & (cache.num_long - 1)
        facts = finish(text, begin, end, tables, scratch)
        finished, key_room = facts & 0xFFFF, (size + 7) & ~7
        place, used = word_at(cache.counters, USED_POOL << 3), word_at(cache.counters, USED_LONG << 3)
        if used > cache.num_long // 2 or place + key_room + finished + SLACK > cache.pool_size:
            _forget(cache)
            continue
        for i in range(size):
            put_byte(cache.pool, place + i, byte_at(text, begin + i))
        _copy(scratch.finished, 0, finished, cache.pool, place + key_room)
        put_word(cache.long, slot, mixed)
        put_word(cache.long, slot + 8, size | (place << 16))
        put_word(cache.long, slot + 16, facts)
        put_word(cache.long, slot + 24, place + key_room)
        _counted(cache, USED_LONG, 1)
        _counted(cache, USED_POOL, key_room + ((finished + 7) & ~7))
        return slot


@inner
def _short_slot(text, begin, end, text_size, tables, cache, scratch):
    """Place in `cache.short` of a segment of at most `SHORT` bytes, encoded if it was not there."""
    size = end - begin
    if begin + SHORT <= text_size:
        first, second = word_at(text, begin), word_at(text, begin + 8)
        if size <= 8:  # bytes of the segment only, at the upper end: no NUL among them, so no two are alike
            first, second = first << (64 - 8 * size), 0
        else:
            second = second << (128 - 8 * size)
    else:
        first, second = _careful_word(text, begin, end), _careful_word(text, begin + 8, end)
        if size <= 8:
            first <<= 64 - 8 * size
        else:
            second <<= 128 - 8 * size
    mixed = (first ^ (second * HASH_FACTOR)) * HASH_FACTOR
    mixed = (mixed ^ ((mixed >> 32) & _MASK32)) * HASH_FACTOR
    while True:
        index = (mixed >> 36) & (cache.num_short - 1)
        while True:
            slot = index * SLOT
            if word_at(cache.short, slot) == first and word_at(cache.short, slot + 8) == second:
                return slot
            if word_at(cache.short, slot + 16) == 0:
                break
            index = (index + 1) & (cache.num_short - 1)
        if _new_short(text, begin, end, slot, tables, cache, scratch):
            put_word(cache.short, slot, first)
            put_word(cache.short, slot + 8, second)
            return slot


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
            _copy(frame.before, 0, frame.before_size, out, o)
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
                slot = _short_slot(text, p, q, text_size, tables, cache, scratch)
                facts = word_at(cache.short, slot + 16)
                count = facts & 0xFFFF
                if count <= INLINE:
                    put_word(out, o, word_at(cache.short, slot + 24))
                    put_word(out, o + 8, word_at(cache.short, slot + 32))
                    if count > 16:
                        _copy(cache.short, slot + 40, count - 16, out, o + 16)
                else:
                    _copy(cache.pool, word_at(cache.short, slot + 24), count, out, o)
            else:
                slot = _long_slot(text, p, q, tables, cache, scratch)
                facts = word_at(cache.long, slot + 16)
                count = facts & 0xFFFF
                _copy(cache.pool, word_at(cache.long, slot + 24), count, out, o)
            o += count
            tokens += (facts >> 16) & 0xFFFF
            largest = max(largest, facts >> 32)
            p = q
        _copy(frame.behind, 0, frame.behind_size, out, o)
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
    # numba looks at this file's time only and would keep code of an older `merging` or `memory`
    stamp = int.from_bytes(_digest_of_sources()[:4], "little")

    @njit(nogil=True, cache=True, error_model="numpy")
    def encode_block(text, size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state):
        state[STAMP] = stamp
        return _encode(text, size, begins, ends, frame, tables, cache, scratch, out, capacity, sizes, lengths, state)

    return encode_block


def _digest_of_sources() -> bytes:
    sources = sorted(Path(__file__).with_name(f"{name}.py") for name in ("kernel", "memory", "merging", "tables"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).digest()
