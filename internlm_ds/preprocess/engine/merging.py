"""Ids of one segment: plain BPE on its characters, compiled. Used by `kernel` for segments it has not met yet.

A segment is short, so the pairs are looked through for each merge; nothing is sorted. Everything is int64. Imports
numba: only `kernel` imports this.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from internlm_ds.preprocess.engine.memory import byte_at, half_at, put_word, word_at
from internlm_ds.preprocess.engine.tables import HASH_FACTOR, ID_BITS, NO_RANK

_ID_MASK = (1 << ID_BITS) - 1
inner: Any = njit(nogil=True, error_model="numpy", forceinline=True)  # part of the loop
outer: Any = njit(nogil=True, error_model="numpy")  # called where it happens seldom


@inner
def code_at(text, p):
    """Code point and bytes of the character at `p`."""
    c = byte_at(text, p)
    if c < 0x80:
        return c, 1
    if c < 0xE0:
        return ((c & 0x1F) << 6) | (byte_at(text, p + 1) & 0x3F), 2
    if c < 0xF0:
        return ((c & 0x0F) << 12) | ((byte_at(text, p + 1) & 0x3F) << 6) | (byte_at(text, p + 2) & 0x3F), 3
    code = ((c & 0x07) << 18) | ((byte_at(text, p + 1) & 0x3F) << 12)
    return code | ((byte_at(text, p + 2) & 0x3F) << 6) | (byte_at(text, p + 3) & 0x3F), 4


@outer
def user_piece(text, p, end, tables):
    """Bytes and id of the longest user-defined piece that begins at `p`; 0 bytes if none does."""
    node = size = 0
    found = -1
    q = p
    while q < end:
        node = half_at(tables.trie, ((node << 8) | byte_at(text, q)) << 2)
        if node == 0:
            break
        q += 1
        if half_at(tables.trie_ids, node << 2) >= 0:
            size, found = q - p, half_at(tables.trie_ids, node << 2)
    return size, found


@inner
def _merged(left, right, tables):
    """Id of two symbols in one, -1 if they do not fuse."""
    if left < 0 or right < 0:
        return -1
    pair = (left << ID_BITS) | right
    slot = ((pair * HASH_FACTOR) >> 36) & (tables.num_slots - 1)
    while True:
        word = word_at(tables.merges, slot << 3)
        if word == 0:
            return -1
        if word >> ID_BITS == pair:
            return word & _ID_MASK
        slot = (slot + 1) & (tables.num_slots - 1)


@inner
def _symbols(text, begin, end, tables, scratch):
    """Ids of a segment's characters (below zero for one in no piece), where they start, and how many."""
    count, p = 0, begin
    while p < end:
        code, size = code_at(text, p)
        put_word(scratch.ids, count << 3, half_at(tables.char_ids, code << 2) if code < tables.num_codes else -1)
        put_word(scratch.starts, count << 3, p)
        count += 1
        p += size
    put_word(scratch.starts, count << 3, end)
    return count


@inner
def _note_merge(j, tables, scratch):
    """Look up what symbols `j` and `j + 1` make."""
    number = _merged(word_at(scratch.ids, j << 3), word_at(scratch.ids, (j + 1) << 3), tables)
    put_word(scratch.merged, j << 3, number)
    put_word(scratch.ranks, j << 3, half_at(tables.ranks, number << 2) if number >= 0 else NO_RANK)


@inner
def _merge(count, tables, scratch):
    """Plain BPE on the symbols in `scratch`, best score first, leftmost of equal ones; returns how many are left."""
    for j in range(count - 1):
        _note_merge(j, tables, scratch)
    while True:
        best, at = NO_RANK, -1
        for j in range(count - 1):
            rank = word_at(scratch.ranks, j << 3)
            if rank < best:
                best, at = rank, j
        if at < 0:
            return count
        put_word(scratch.ids, at << 3, word_at(scratch.merged, at << 3))
        for j in range(at + 1, count - 1):
            put_word(scratch.ids, j << 3, word_at(scratch.ids, (j + 1) << 3))
            put_word(scratch.merged, j << 3, word_at(scratch.merged, (j + 1) << 3))
            put_word(scratch.ranks, j << 3, word_at(scratch.ranks, (j + 1) << 3))
            put_word(scratch.starts, j << 3, word_at(scratch.starts, (j + 1) << 3))
        count -= 1
        put_word(scratch.starts, count << 3, word_at(scratch.starts, (count + 1) << 3))
        if at > 0:
            _note_merge(at - 1, tables, scratch)
        if at < count - 1:
            _note_merge(at, tables, scratch)


@inner
def _append_id(number, size, tables, scratch):
    put_word(scratch.finished, size, word_at(tables.id_texts, number << 3))
    return size + half_at(tables.id_sizes, number << 2)


@outer
def finish(text, begin, end, tables, scratch):
    """Encode a segment into `scratch.finished`: bytes | tokens << 16 | largest id << 32."""
    size = tokens = largest = 0
    length, number = user_piece(text, begin, end, tables)
    if length == end - begin:
        return _append_id(number, 0, tables, scratch) | (1 << 16) | (number << 32)
    count = _merge(_symbols(text, begin, end, tables, scratch), tables, scratch)
    for j in range(count):
        number = word_at(scratch.ids, j << 3)
        if 0 <= number < tables.num_pieces:
            size = _append_id(number, size, tables, scratch)
            tokens, largest = tokens + 1, max(largest, number)
            continue
        for p in range(word_at(scratch.starts, j << 3), word_at(scratch.starts, (j + 1) << 3)):
            number = half_at(tables.byte_ids, byte_at(text, p) << 2)
            size = _append_id(number, size, tables, scratch)
            tokens, largest = tokens + 1, max(largest, number)
    return size | (tokens << 16) | (largest << 32)
