"""Scanning many bins at once: blocks of whole lines, threads, columns put together in order.

Memory is a few blocks and 32 bytes a sample, twice that for a moment when a file is put together. Blocks are read, not
mapped, so a file that is cut short while it is looked at is an error and no crash.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from internlm_ds.data.doctor.lines import Lines, join, measure_plainly

Engine = Literal["auto", "compiled", "plain"]

BLOCK_BYTES = 1 << 21
READ_ON_BYTES = 1 << 16
SMALL_BYTES = 1 << 24
"""Up to so many bytes in all, loading the compiled scan takes longer than doing without."""


def scan_bins(
    paths: Sequence[str],
    *,
    workers: int = 1,
    engine: Engine = "auto",
    block_bytes: int = BLOCK_BYTES,
    done: Callable[[Lines], None] = lambda block: None,
) -> Iterator[Lines | OSError]:
    """The lines of each bin, in the order of `paths`; an `OSError` instead where a file cannot be read.

    Args:
        workers: Threads; while one file is handed out the next ones are being scanned.
        engine: "auto" takes the compiled scan for more than `SMALL_BYTES`, if numba is there.
        done: Called with each block that is finished.
    """
    measure = measure_for(paths, engine)
    tasks, ahead = _tasks(paths, block_bytes), deque[tuple[int, Future[Lines]]]()
    with ThreadPoolExecutor(workers) as pool:
        for number in range(len(paths)):
            parts: list[Lines] = []
            failed: OSError | None = None
            while True:
                while len(ahead) < 2 * workers + 1 and (task := next(tasks, None)) is not None:
                    ahead.append((task[0], pool.submit(_measure_block, paths[task[0]], *task[1:], measure)))
                if not ahead or ahead[0][0] != number:
                    break
                try:
                    parts.append(ahead.popleft()[1].result())
                    done(parts[-1])
                except OSError as error:
                    failed = error
            whole = failed or join(parts)
            parts = []  # not held while the caller looks at the whole
            yield whole


def measure_for(paths: Sequence[str], engine: Engine) -> Callable[[memoryview], Lines]:
    """The function that measures a block."""
    if engine == "plain" or (engine == "auto" and sum(map(_size, paths)) <= SMALL_BYTES):
        return measure_plainly
    try:
        from internlm_ds.data.doctor.kernel import measure_compiled
    except ImportError:
        if engine == "compiled":
            raise
        return measure_plainly
    return measure_compiled


def _tasks(paths: Sequence[str], block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(number of the file, from, to): at least one for each file; whoever cannot open it will say so."""
    for number, path in enumerate(paths):
        for start in range(0, max(_size(path), 1), block_bytes):
            yield number, start, start + block_bytes


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


class _Buffers(threading.local):
    """A thread's memory for its blocks: fresh memory for each would cost as much as looking at it."""

    def __init__(self) -> None:
        self.block = bytearray()


_buffers = _Buffers()


def _measure_block(path: str, start: int, stop: int, measure: Callable[[memoryview], Lines]) -> Lines:
    """The lines that begin in `[start, stop)`; a block without any has size 0."""
    block = _buffers.block
    before = 1 if start else 0  # a line begins here if the byte before is a newline
    with open(path, "rb", buffering=0) as file:
        file.seek(start - before)
        filled = _fill(file, block, 0, stop - start + before)
        first = block.find(b"\n", 0, filled) + 1 if before else 0
        if before and not first:
            return measure(memoryview(b""))
        while filled and block[filled - 1] != 0x0A:
            more = _fill(file, block, filled, READ_ON_BYTES)
            end = block.find(b"\n", filled, filled + more) + 1
            filled = end or filled + more
            if not more:
                break
    with memoryview(block) as view:
        return measure(view[first:filled])


def _fill(file: io.FileIO, block: bytearray, start: int, size: int) -> int:
    """Read up to `size` bytes into the block from `start` on, making room; how many there were."""
    if len(block) < start + size:
        block.extend(bytes(start + size - len(block)))
    done = 0
    with memoryview(block) as view:
        while done < size and (count := file.readinto(view[start + done : start + size])):
            done += count
    return done
