"""Finished segments, kept and found again, compiled. One cache serves all threads at once, without locks.

A segment of at most 16 bytes lies with its finished text, `"12, 345, "`, in one slot of 64 bytes, a longer one in a
pool. A slot's facts are published last: 0 free, -1 being filled, else bytes | tokens << 16 | largest id << 32. A thread
that finds no finished slot encodes, and keeps the result if it can claim a free one; two threads may encode the same
segment, with the same result. Nothing is ever taken out: a full cache takes no more, and `fast_rows` begins another.
Imports numba: only `kernel` imports this.
"""

from __future__ import annotations

from internlm_ds.preprocess.engine.calls import INLINE, LONG_SLOT, SHORT, SLACK, SLOT, USED_LONG, USED_POOL, USED_SHORT
from internlm_ds.preprocess.engine.memory import (
    add_at,
    byte_at,
    claim,
    publish,
    published_at,
    put_byte,
    put_word,
    word_at,
)
from internlm_ds.preprocess.engine.merging import finish, inner, outer
from internlm_ds.preprocess.engine.tables import HASH_FACTOR

_BEING_FILLED = -1
_MASK32 = 0xFFFFFFFF


@inner
def copy_words(source, size, target):
    """Copy bytes in words; up to seven behind the end are written too."""
    for i in range(0, size, 8):
        put_word(target, i, word_at(source, i))


@outer
def _pool_room(size, cache):
    """Address of so many bytes of the pool, rounded up to words; 0 if it is full."""
    rounded = (size + 7) & ~7
    place = add_at(cache.counters, USED_POOL, rounded)
    return cache.pool + place if place + rounded + SLACK <= cache.pool_size else 0


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
def _keep_short(first, second, slot, facts, cache, scratch):
    """Put a segment that was just encoded into a free slot, if there is room."""
    size = facts & 0xFFFF
    room = 0
    if size > INLINE:
        room = _pool_room(size, cache)
        if room == 0:
            return
    if word_at(cache.counters, USED_SHORT) >= cache.most_short or not claim(slot, 16, _BEING_FILLED):
        return
    add_at(cache.counters, USED_SHORT, 1)
    put_word(slot, 0, first)
    put_word(slot, 8, second)
    if size > INLINE:
        copy_words(scratch.finished, size, room)
        put_word(slot, 24, room)
    else:
        for i in range(0, INLINE, 8):
            put_word(slot, 24 + i, word_at(scratch.finished, i))
    publish(slot, 16, facts)


@inner
def short_segment(text, begin, end, text_size, tables, cache, scratch):
    """Address of the finished text of a segment of at most `SHORT` bytes, and its facts."""
    size = end - begin
    # its bytes only, at the upper end of a word: there is no NUL among them, so no two are alike
    if begin + SHORT <= text_size:
        first, second = word_at(text, begin), word_at(text, begin + 8)
    else:
        first, second = _careful_word(text, begin, end), _careful_word(text, begin + 8, end)
    if size <= 8:
        first, second = first << (64 - 8 * size), 0
    else:
        second <<= 128 - 8 * size
    mixed = (first ^ (second * HASH_FACTOR)) * HASH_FACTOR
    mixed = (mixed ^ ((mixed >> 32) & _MASK32)) * HASH_FACTOR
    index = (mixed >> 36) & (cache.num_short - 1)
    while True:
        slot = cache.short + index * SLOT
        facts = published_at(slot, 16)
        if facts == 0:
            facts = finish(text, begin, end, tables, scratch)
            _keep_short(first, second, slot, facts, cache, scratch)
            return scratch.finished, facts
        if facts > 0 and word_at(slot, 0) == first and word_at(slot, 8) == second:
            return (slot + 24 if facts & 0xFFFF <= INLINE else word_at(slot, 24)), facts
        index = (index + 1) & (cache.num_short - 1)


@inner
def _long_hash(text, begin, end):
    mixed = end - begin
    for p in range(begin, end - 8, 8):
        mixed = (mixed ^ word_at(text, p)) * HASH_FACTOR
        mixed ^= (mixed >> 32) & _MASK32
    mixed = (mixed ^ word_at(text, end - 8)) * HASH_FACTOR
    return mixed ^ ((mixed >> 32) & _MASK32)


@inner
def _same(text, begin, size, kept):
    """Whether a segment of more than eight bytes is the one that is kept."""
    for i in range(0, size - 8, 8):
        if word_at(text, begin + i) != word_at(kept, i):
            return False
    return word_at(text, begin + size - 8) == word_at(kept, size - 8)


@outer
def _keep_long(text, begin, size, mixed, slot, facts, cache, scratch):
    finished, key_room = facts & 0xFFFF, (size + 7) & ~7
    room = _pool_room(key_room + finished, cache)
    if room == 0 or word_at(cache.counters, USED_LONG) >= cache.most_long or not claim(slot, 16, _BEING_FILLED):
        return
    add_at(cache.counters, USED_LONG, 1)
    for i in range(size):
        put_byte(room, i, byte_at(text, begin + i))
    copy_words(scratch.finished, finished, room + key_room)
    put_word(slot, 0, mixed)
    put_word(slot, 8, size | ((room - cache.pool) << 16))
    put_word(slot, 24, room + key_room)
    publish(slot, 16, facts)


@outer
def long_segment(text, begin, end, tables, cache, scratch):
    """Address of the finished text of a segment of more than `SHORT` bytes, and its facts."""
    size = end - begin
    mixed = _long_hash(text, begin, end)
    index = (mixed >> 24) & (cache.num_long - 1)
    while True:
        slot = cache.long + index * LONG_SLOT
        facts = published_at(slot, 16)
        if facts == 0:
            facts = finish(text, begin, end, tables, scratch)
            _keep_long(text, begin, size, mixed, slot, facts, cache, scratch)
            return scratch.finished, facts
        key = word_at(slot, 8)
        is_like = facts > 0 and word_at(slot, 0) == mixed and key & 0xFFFF == size
        if is_like and _same(text, begin, size, cache.pool + (key >> 16)):
            return word_at(slot, 24), facts
        index = (index + 1) & (cache.num_long - 1)
