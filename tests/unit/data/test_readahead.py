"""Reading ahead in a thread: order, errors where they belong, and no thread left behind."""

from __future__ import annotations

import gc
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
    thread = ahead._thread
    assert ahead.next() == 0 and thread is not None
    del ahead
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_process_ends_although_a_thread_reads_ahead() -> None:
    code = "import itertools; from internlm_ds.data.readahead import ReadAhead\n"
    code += "ahead = ReadAhead(itertools.count(), depth=2); print(ahead.next())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")
