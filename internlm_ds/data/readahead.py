"""An iterator whose next items are prepared by threads. It knows nothing of data.

Daemon threads and one lock, no process: nothing to fork after threads exist, nothing to hang on at exit. However many
threads there are, items come in order; an exception comes out where its item would have.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1


class ReadAhead(Generic[Item]):
    """What `make` makes of each item of an iterator.

    Args:
        items: Drawn one at a time, by one thread at a time; belongs to this object from now on.
        make: The work, done by several threads at once; None if the items are the results.
        depth: Results to keep ready, beside those in the making; 0 prepares each when asked, without a thread.
        workers: Threads.
    """

    def __init__(
        self, items: Iterator[Any], *, depth: int, make: Callable[[Any], Item] | None = None, workers: int = 1
    ):
        self._shared = _Shared(items, make, depth + workers)
        self._threads: list[threading.Thread] = []
        # the threads hold no reference to this object, so they end when nobody wants its items any more
        self._finalizer = weakref.finalize(self, self._shared.stop)
        for number in range(workers if depth > 0 else 0):
            name = f"internlm-ds-data-{number}"
            self._threads.append(threading.Thread(target=_work, args=(self._shared,), name=name, daemon=True))
            self._threads[-1].start()

    def next(self) -> Item:
        """The next item.

        Raises:
            StopIteration: There is none, or it is behind one that failed.
            Exception: Whatever making it raised.
        """
        shared = self._shared
        if not self._threads:
            number, item, error = shared.draw()
            shared.put(number, *shared.made(item, error))
        result, error = shared.take(lambda: any(thread.is_alive() for thread in self._threads))
        if error is not None:
            raise error
        made: Item = result
        return made

    def close(self) -> None:
        """Stop the threads and wait for them: afterwards nobody touches the iterator."""
        self._shared.stop()
        for thread in self._threads:
            thread.join()


class _Shared:
    """What the threads and the one who takes results have in common; all of it is touched under `changed` only."""

    def __init__(self, items: Iterator[Any], make: Callable[[Any], Any] | None, room: int):
        self.items, self.make, self.room = items, make, room
        self.changed = threading.Condition()
        self.results: dict[int, tuple[Any, BaseException | None]] = {}
        self.drawn, self.taken = 0, 0
        self.end: int | None = None  # nothing comes from this number on
        self.stopped = False

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def wait_for_room(self) -> bool:
        """Wait until an item may be drawn; False if none is wanted any more. The lock is held."""
        while not self.stopped and self.end is None and self.drawn - self.taken >= self.room:
            self.changed.wait(_POLL_S)
        return not self.stopped and self.end is None

    def draw(self) -> tuple[int, Any, BaseException | None]:
        number, self.drawn = self.drawn, self.drawn + 1
        if self.end is not None:
            return number, None, StopIteration()
        try:
            return number, next(self.items), None
        except BaseException as error:
            self.end = number + 1
            return number, None, error

    def made(self, item: Any, error: BaseException | None) -> tuple[Any, BaseException | None]:
        if error is not None or self.make is None:
            return item, error
        try:
            return self.make(item), None
        except BaseException as failure:
            return None, failure

    def put(self, number: int, result: Any, error: BaseException | None) -> None:
        with self.changed:
            self.results[number] = result, error
            if error is not None:
                self.end = number + 1 if self.end is None else min(self.end, number + 1)
            self.changed.notify_all()

    def take(self, somebody_works: Callable[[], bool]) -> tuple[Any, BaseException | None]:
        with self.changed:
            while self.taken not in self.results:
                if (self.end is not None and self.taken >= self.end) or not somebody_works():
                    return None, StopIteration()
                self.changed.wait(_POLL_S)
            found = self.results.pop(self.taken)
            self.taken += 1
            self.changed.notify_all()
            return found


def _work(shared: _Shared) -> None:
    while True:
        with shared.changed:
            if not shared.wait_for_room():
                return
            number, item, error = shared.draw()
        shared.put(number, *shared.made(item, error))
