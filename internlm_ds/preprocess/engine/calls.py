"""What a call of the kernel is told and tells, as int64 numbers in memory; sizes that both sides agree on. No numba.

Every class here is a row of such numbers: an array of them is filled by `fast_rows` and read by `kernel`.
"""

from __future__ import annotations

from typing import NamedTuple

DONE, LEFTOVER, GROW = 0, 1, 2  # why a call ended
MAX_SEGMENT = 512  # bytes
MAX_FINISHED = 8 * MAX_SEGMENT
SLACK = 64  # bytes that may be read or written behind a buffer's end
# a short segment: its bytes, facts, then 40 bytes of finished text or its address in the pool
SHORT, SLOT, INLINE = 16, 64, 40
# a long one: hash, bytes | place in the pool << 16, facts, address of the finished text
LONG_SLOT = 32
USED_SHORT, USED_LONG, USED_POOL = 0, 8, 16  # offsets of a cache's counters


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


class Places(NamedTuple):
    """Addresses of a model's `Tables`, and the sizes that are asked for."""

    classes: int
    joins: int
    char_ids: int
    num_codes: int
    merges: int
    num_slots: int
    ranks: int
    byte_ids: int
    trie: int
    trie_ids: int
    id_texts: int
    num_pieces: int
    id_sizes: int


class Scratch(NamedTuple):
    """Addresses of room for one segment: int64 numbers each, and `finished` (bytes)."""

    ids: int
    starts: int
    merged: int
    ranks: int
    finished: int


class Cache(NamedTuple):
    """Addresses, aligned to their slots; sizes in slots (powers of two) and bytes; how many slots may be used."""

    short: int
    num_short: int
    most_short: int
    long: int
    num_long: int
    most_long: int
    pool: int
    pool_size: int
    counters: int
