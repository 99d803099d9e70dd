"""The compiled loop: texts of a block in, their rows out, through a cache of finished segments.

A segment is a stretch of text between two cuts (see `tables`); its ids depend on nothing outside it. Segments repeat,
so the finished text of their ids, `"12, 345, "`, is kept and a row is made by copying. Three ends of a call: `DONE`;
`LEFTOVER`, a segment that is not ours (NUL, or over-long), for the caller to append before it calls again; `GROW`, the
output is too small. The loop continues where it was. Imports numba: only `machine_code` imports this, when it has to.

Everything is int64: shifts to the right drag the sign in and are masked.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import njit

from internlm_ds.preprocess.engine.calls import (
    DONE,
    GROW,
    LEFTOVER,
    MAX_FINISHED,
    MAX_SEGMENT,
    SHORT,
    SLACK,
    Cache,
    Call,
    Frame,
    Places,
    Scratch,
    State,
)
from internlm_ds.preprocess.engine.memory import byte_at, numbers_at, put_word, word_at
from internlm_ds.preprocess.engine.merging import code_at, inner, outer, user_piece
from internlm_ds.preprocess.engine.segments import copy_words, long_segment, short_segment

_MASK32 = 0xFFFFFFFF
_ROW_MASK = 0x7FFFFFFF


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
    """The loop; `job` is the address of a `Call`."""
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


@cache
def jitted(stamp: int) -> Any:
    """The compiled loop as numba keeps it on disk: takes the address of a `Call`, returns why it stopped.

    Args:
        stamp: Differs where the sources do: numba looks at this file's time only and would keep code of older helpers.
    """

    def encode_block(job):
        return _encode(job) if stamp >= 0 else -1

    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit("int64(int64)", cache=True, **options)(encode_block)
    except RuntimeError:  # there is no folder where numba could keep it
        return njit("int64(int64)", **options)(encode_block)


def compiled_object() -> tuple[str, bytes]:
    """The loop as an object file that needs nothing else, and the name of the function in it.

    It takes (address for the result, address for an exception, address of a `Call`) and returns 0 unless it failed.
    """
    from numba.core import compiler, types
    from numba.core.registry import cpu_target

    def encode_block(job):
        return _encode(job)

    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    contexts = (cpu_target.typing_context, cpu_target.target_context)
    found = compiler.compile_extra(*contexts, encode_block, (types.int64,), types.int64, flags, {})
    return found.fndesc.llvm_func_name, found.library._get_compiled_object()
