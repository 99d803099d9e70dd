"""An iterator whose next items are prepared in a thread. It knows nothing of data.

One daemon thread, a short queue, no process: nothing to fork after threads exist, nothing to hang on at exit. Items
come in order; an exception comes out where its item would have.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_S = 0.1


class ReadAhead(Generic[Item]):
    """Items of an iterator.

    Args:
        items: Where they come from; belongs to this object from now on.
        depth: Items to keep ready; 0 prepares each when asked, without a thread.
    """

    def __init__(self, items: Iterator[Item], *, depth: int):
        self._items = items
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=depth)
            arguments = (items, self._queue, self._stop)
            self._thread = threading.Thread(target=_produce, args=arguments, name="internlm-ds-data", daemon=True)
            # the thread holds no reference to this object, so it ends when nobody wants its items any more
            self._finalizer = weakref.finalize(self, self._stop.set)
            self._thread.start()

    def next(self) -> Item:
        """The next item.

        Raises:
            StopIteration: There is none, or it is behind one that failed.
            Exception: Whatever making it raised.
        """
        if self._thread is None:
            return next(self._items)
        while True:
            try:
                item, error = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise StopIteration from None
                continue
            if error is not None:
                raise error
            return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread and wait for it: afterwards nobody touches the iterator."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


def _produce(
    items: Iterator[Item], results: queue.Queue[tuple[Item | None, BaseException | None]], stop: threading.Event
) -> None:
    while not stop.is_set():
        try:
            result: tuple[Item | None, BaseException | None] = (next(items), None)
        except BaseException as error:
            result = (None, error)
        while not stop.is_set():
            try:
                results.put(result, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if result[1] is not None:
            return
