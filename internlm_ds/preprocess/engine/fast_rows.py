"""Rows by the compiled kernel: one cache for all threads, buffers that are used again, leftovers to sentencepiece.

`machine_code` has the kernel, `calls` what is handed to it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from internlm_ds.preprocess.engine import calls, machine_code
from internlm_ds.preprocess.engine.tables import Array, Tables
from internlm_ds.preprocess.rows import Rows, TextBlock
from internlm_ds.preprocess.tokenizers import Encoder

_SHORT_SLOTS, _LONG_SLOTS, _POOL_BYTES = 1 << 18, 1 << 15, 1 << 22
_KEPT_BUFFER_BYTES = 16 << 20
_LINE_BEGIN = b'{"tokens": ['


class FastRows:
    """`RowEncoder` over the calls.

    Args:
        tables: Of the model.
        encoder: Ids of the few segments that the kernel leaves over.
        before, behind: Ids put before and behind each sample.
        slots: Room for finished segments, a power of two; a full cache is replaced by an empty one.
    """

    engine = "compiled"

    def __init__(
        self,
        tables: Tables,
        encoder: Encoder,
        *,
        before: Sequence[int] = (),
        behind: Sequence[int] = (),
        slots: int = _SHORT_SLOTS,
    ):
        self._tables = tables
        self._places = _places(tables)
        self._encoder = encoder
        self._frame, self._frame_texts = _frame(before, behind)
        self._slots = slots
        self._function = machine_code.encode_block()
        self._cache = _Segments(slots)
        self._idle: deque[_Scratch] = deque()
        self._buffers: deque[Array] = deque(maxlen=64)

    def encode(self, block: TextBlock) -> Rows:
        """Rows of a block. Their `data` lies in a buffer that is used again once nobody holds it."""
        try:
            scratch = self._idle.pop()
        except IndexError:
            scratch = _Scratch()
        cache = self._cache
        try:
            return self._encode(block, cache, scratch)
        finally:
            self._idle.append(scratch)
            if cache.is_full and self._cache is cache:
                self._cache = _Segments(self._slots)  # two threads may do so: one of the new ones is lost

    def _encode(self, block: TextBlock, cache: _Segments, scratch: _Scratch) -> Rows:
        text = np.frombuffer(block.text, dtype=np.uint8)
        begins, ends = (np.ascontiguousarray(a, dtype=np.int64) for a in (block.begins, block.ends))
        sizes, lengths = np.empty(len(block), np.int64), np.empty(len(block), np.int64)
        state = _numbers(calls.State())
        out = self._buffer(len(block) * 64 + len(text) * 5 // 2)
        while True:
            call = _numbers(
                calls.Call(
                    *(_address(text), len(text), _address(begins), _address(ends), len(block)),
                    *(_address(out), len(out) - calls.SLACK, _address(sizes), _address(lengths)),
                    *map(_address, (self._frame, self._places, cache.places, scratch.places, state)),
                )
            )
            code = self._function(_address(call))
            now = calls.State(*state.tolist())
            if code == calls.DONE:
                return Rows(self._lent(out, now.out), sizes, lengths, now.largest)
            if code == calls.GROW:
                out = self._grown(out, used=now.out)
            else:
                out, after = self._append_leftover(block.text, out, now)
                state[:] = after

    def _append_leftover(self, text: Any, out: Array, state: calls.State) -> tuple[Array, calls.State]:
        """Let sentencepiece encode the segment at which the kernel stopped, and step over it."""
        (ids,) = self._encoder.encode([bytes(text[state.place : state.segment_end]).decode()])
        finished, place = _finished(ids), state.out
        while place + len(finished) + calls.MAX_FINISHED > len(out):
            out = self._grown(out, used=place)
        out[place : place + len(finished)] = np.frombuffer(finished, dtype=np.uint8)
        return out, state._replace(
            place=state.segment_end,
            out=place + len(finished),
            tokens=state.tokens + len(ids),
            largest=max(state.largest, max(ids, default=-1)),
        )

    def _buffer(self, num_bytes: int) -> Array:
        """A buffer of at least so many bytes, a used one where there is: its pages are already ours."""
        needed = num_bytes + 4 * calls.MAX_FINISHED
        for _ in range(len(self._buffers)):
            try:
                buffer = self._buffers.pop()
            except IndexError:
                break
            if len(buffer) >= needed:
                return buffer
        return np.empty(1 << (needed - 1).bit_length(), np.uint8)

    def _grown(self, out: Array, *, used: int) -> Array:
        larger = self._buffer(2 * len(out))
        larger[:used] = out[:used]
        return larger

    def _lent(self, out: Array, used: int) -> memoryview:
        """What was written, as bytes; when the last view of it is gone the buffer comes back."""
        view = out[:used]
        if len(out) <= _KEPT_BUFFER_BYTES:
            weakref.finalize(view, self._buffers.append, out).atexit = False
        return view.data


class _Segments:
    """A cache and its memory."""

    def __init__(self, slots: int):
        short, self._short = _aligned(slots * calls.SLOT)
        long, self._long = _aligned(_LONG_SLOTS * calls.LONG_SLOT)
        pool, self._pool = _aligned(_POOL_BYTES)
        counters, self._counters = _aligned(24)
        most = slots - slots // 4, _LONG_SLOTS // 2
        self._most = most
        self.places = _numbers(
            calls.Cache(short, slots, most[0], long, _LONG_SLOTS, most[1], pool, _POOL_BYTES, counters)
        )

    @property
    def is_full(self) -> bool:
        """Whether new segments find no room."""
        short, long, pool = np.frombuffer(self._counters, dtype=np.int64, count=3).tolist()
        return bool(short >= self._most[0] or long >= self._most[1] or pool >= _POOL_BYTES)


class _Scratch:
    """What one call needs for itself while it runs."""

    def __init__(self) -> None:
        symbols = [np.zeros(calls.MAX_SEGMENT + 8, np.int64) for _ in range(4)]
        finished = np.zeros(calls.MAX_FINISHED + calls.SLACK, np.uint8)
        self._arrays = [*symbols, finished]
        ids, starts, merged, ranks = map(_address, symbols)
        self.places = _numbers(calls.Scratch(ids, starts, merged, ranks, _address(finished)))


def _aligned(num_bytes: int) -> tuple[int, Array]:
    """Zeros from an address that is a multiple of 64, a line of the processor's cache: no slot lies in two of them."""
    array = np.zeros(num_bytes + 64, np.uint8)
    skipped = -_address(array) % 64
    return _address(array) + skipped, array[skipped : skipped + num_bytes]


def _places(tables: Tables) -> Array:
    numbers = {name: _address(array) for name, array in tables._asdict().items()}
    sizes = {"num_codes": len(tables.classes), "num_slots": len(tables.merges), "num_pieces": len(tables.id_texts)}
    return _numbers(calls.Places(**numbers, **sizes))


def _frame(before: Sequence[int], behind: Sequence[int]) -> tuple[Array, list[Array]]:
    """The frame, and what its addresses point to."""
    texts = [_LINE_BEGIN + _finished(before), _finished(behind)]
    padded = [np.frombuffer(text + b"\0" * calls.SLACK, dtype=np.uint8) for text in texts]
    first, last = map(_address, padded)
    largest = max([*before, *behind], default=-1)
    frame = calls.Frame(first, len(texts[0]), last, len(texts[1]), len(before) + len(behind), largest)
    return _numbers(frame), padded


def _finished(ids: Sequence[int]) -> bytes:
    return "".join([f"{i}, " for i in ids]).encode()


def _numbers(values: Sequence[int]) -> Array:
    return np.array(values, dtype=np.int64)


def _address(array: Array) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)
