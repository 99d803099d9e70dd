"""Pieces to rows on several threads, in the order of the pieces whatever thread is done first.

The encoders leave Python for nearly all of their time, so threads suffice. Few pieces are under way at a time: memory
depends on the number of threads, not on the inputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from internlm_ds.preprocess.blocks import Piece, split
from internlm_ds.preprocess.rows import RowEncoder, Rows, TextBlock

Job = TypeVar("Job")
Result = TypeVar("Result")
_HEAD, _TAIL, _BETWEEN = b'{"tokens": [', b"]}\n", b", "
_AHEAD = 2  # pieces that wait for a thread, or for being written


def in_order(jobs: Iterator[Job], work: Callable[[Job], Result], *, workers: int) -> Iterator[tuple[Job, Result]]:
    """Each job with its result; an exception of a job is raised at its turn.

    With one worker everything is done on the calling thread.
    """
    if workers == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting: deque[tuple[Job, Future[Result]]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as threads:
        try:
            for job in jobs:
                waiting.append((job, threads.submit(work, job)))
                if len(waiting) >= workers + _AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def give_back_memory() -> None:
    """Let the C library return what it holds unused: freed buffers of many sizes leave holes, and they add up."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not every C library has this
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Encoded:
    """Rows of a piece, and how many texts without tokens were left out."""

    rows: Rows
    empty: int


@dataclass(frozen=True)
class PieceEncoder:
    """What a thread does with a piece.

    Attributes:
        encoder: Puts `num_ends` ids (bos, eos) around those of each text.
        keep_empty: Texts without ids are samples too, as in the reference.
    """

    encoder: RowEncoder
    num_ends: int
    text_key: str | None = None
    keep_empty: bool = False

    def __call__(self, piece: Piece) -> Encoded:
        found = split(piece, text_key=self.text_key, keep_empty=self.keep_empty)
        rows = self.encoder.encode(found.block)
        if self.keep_empty or piece.kind == "part" or not (bare := rows.lengths == self.num_ends).any():
            return Encoded(rows, found.empty)
        return Encoded(_only(rows, ~bare), found.empty + int(bare.sum()))


def _only(rows: Rows, kept: np.ndarray) -> Rows:
    ends = np.cumsum(rows.sizes)
    data = memoryview(rows.data)
    chosen = [data[end - size : end] for end, size in zip(ends[kept].tolist(), rows.sizes[kept].tolist())]
    return Rows(b"".join(chosen), rows.sizes[kept], rows.lengths[kept], rows.largest_id)


class Verified:
    """An encoder held against the true one on every block; from the first difference on, the true one alone.

    What goes out is right in any case.
    """

    def __init__(self, encoder: RowEncoder, truth: RowEncoder, *, warn: Callable[[str], None]):
        self._encoder, self._truth, self._warn = encoder, truth, warn
        self.engine = encoder.engine

    def encode(self, block: TextBlock) -> Rows:
        """See `RowEncoder`."""
        expected = self._truth.encode(block)
        if self.engine != self._truth.engine:
            found = self._encoder.encode(block)
            if bytes(found.data) != bytes(expected.data) or not np.array_equal(found.sizes, expected.sizes):
                failed, self.engine = self.engine, self._truth.engine
                text = f"THE ENGINE {failed!r} GAVE OTHER TOKENS than {self.engine} ({_difference(found, expected)}); "
                self._warn(text + f"{self.engine} does the rest, the output is right. Please report this text")
        return expected


def _difference(found: Rows, expected: Rows) -> str:
    pairs = zip(bytes(found.data).split(b"\n"), bytes(expected.data).split(b"\n"))
    shown = next(((a, b) for a, b in pairs if a != b), (b"", b""))
    return " where it should be ".join(line[:80].decode() for line in shown)


class LongRow:
    """Parts of a text, each encoded as a row of its own, as the bytes of one row.

    Args:
        before, behind: The ids around each row.
    """

    def __init__(self, *, before: Sequence[int], behind: Sequence[int]):
        self._before = b"".join(b"%d, " % i for i in before)
        self._behind = b"".join(b", %d" % i for i in behind)
        self._num_ends = len(before) + len(behind)
        self.num_tokens = 0

    def bytes_of(self, rows: Rows, *, begins: bool, ends: bool) -> bytes:
        """What this part adds to the line; `num_tokens` counts on."""
        if begins:
            self.num_tokens = self._num_ends
        head = _HEAD + self._before if begins else b""
        tail = self._behind + _TAIL if ends else b""
        if not len(rows.lengths):
            return head + tail
        self.num_tokens += int(rows.lengths[0]) - self._num_ends
        data = memoryview(rows.data)
        inner = data[len(_HEAD) + len(self._before) : len(data) - len(_TAIL) - len(self._behind)]
        return b"".join((head or _BETWEEN, inner, tail))


def largest_id(data: bytes) -> int:
    """The largest id in lines of a bin without negative ones; -1 where there is none.

    >>> largest_id(b'{"tokens": [3, 20]}')
    20
    """
    return max(map(int, re.findall(rb"\d+", data)), default=-1)
