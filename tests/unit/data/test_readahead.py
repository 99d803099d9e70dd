"""Reading ahead in a thread: order, errors where they belong, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from internlm_ds.data.readahead import ReadAhead


def _until(stop: int) -> Iterator[int]:
    yield from range(stop)
    raise ValueError("damaged")


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_items_come_in_order_and_errors_behind_them(depth: int) -> None:
    ahead = ReadAhead(_until(5), depth=depth)
    assert [ahead.next() for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="damaged"):
        ahead.next()
    with pytest.raises(StopIteration):
        ahead.next()
    ahead.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_work_is_done_at_once_and_handed_out_in_order(workers: int) -> None:
    together = threading.Barrier(workers)

    def square(number: int) -> int:
        if number < 100:
            together.wait(10)  # as many at work as there are threads
        if number == 100:
            raise ValueError("no square")
        return number * number

    ahead = ReadAhead(itertools.count(), make=square, depth=2, workers=workers)
    assert [ahead.next() for _ in range(100)] == [number * number for number in range(100)]
    with pytest.raises(ValueError, match="no square"):
        ahead.next()
    with pytest.raises(StopIteration):
        ahead.next()
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_it_reads_ahead_but_not_without_end() -> None:
    made: list[int] = []
    asked = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                asked.set()
            yield number

    ahead = ReadAhead(items(), depth=2)
    assert asked.wait(5)
    ahead.close()
    assert len(made) <= 4


def test_the_thread_ends_with_the_object() -> None:
    ahead = ReadAhead(iter(range(100)), depth=1)
    (thread,) = ahead._threads
    assert ahead.next() == 0
    del ahead
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_process_ends_although_a_thread_reads_ahead() -> None:
    code = "import itertools; from internlm_ds.data.readahead import ReadAhead\n"
    code += "ahead = ReadAhead(itertools.count(), depth=2); print(ahead.next())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")
