"""The bytes of a text that have been read but not used: whole lines of about a size, or one line however long."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_STEP_BYTES = 1 << 20
_NEWLINE, _RETURN = 0x0A, 0x0D


def count_lines(data: bytes) -> int:
    """Line ends in `data`: `\\n`, `\\r`, and `\\r\\n` as one.

    >>> count_lines(b"a\\n\\r\\nb\\rc")
    3
    """
    array = np.frombuffer(data, dtype=np.uint8)
    count = int(np.count_nonzero(array == _NEWLINE))
    if b"\r" in data:
        count += data.count(b"\r") - data.count(b"\r\n")
    return count


class Window:
    """A view on pieces of bytes of any size that moves forward.

    Attributes:
        line: Number of the line on which it begins, from 1.
    """

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._buffer, self._ended = chunks, bytearray(), False
        self.line = 1

    def is_empty(self) -> bool:
        self._fill(1)
        return not self._buffer

    def drop(self, prefix: bytes) -> None:
        """Pass over `prefix` if it comes next."""
        self._fill(len(prefix))
        if self._buffer.startswith(prefix):
            del self._buffer[: len(prefix)]

    def whole_lines(self, size: int) -> bytes:
        """As many whole lines as fit into `size` bytes; b"" where the next line does not, or nothing is left."""
        self._fill(size + 1)
        if len(self._buffer) <= size:
            return self.take(len(self._buffer))
        cut = max(self._buffer.rfind(b"\n", 0, size), self._buffer.rfind(b"\r", 0, size)) + 1
        return self.take(self._behind(cut - 1)) if cut else b""

    def next_line(self) -> bytes:
        """The next line with its end; the last one may lack it."""
        searched = 0
        while (end := self.line_end(searched)) < 0:
            searched = len(self._buffer)
            self._fill(searched + _STEP_BYTES)
            if len(self._buffer) == searched:
                return self.take(searched)
        return self.take(self._behind(end))

    def line_end(self, start: int = 0, stop: int | None = None) -> int:
        """Place of the first line end among the bytes at hand from `start` to `stop`, -1 if there is none."""
        stop = len(self._buffer) if stop is None else stop
        newline = self._buffer.find(b"\n", start, stop)
        other = self._buffer.find(b"\r", start, stop if newline < 0 else newline)
        return newline if other < 0 else other

    def peek(self, size: int) -> bytes:
        """The next `size` bytes of this line; fewer where it ends."""
        self._fill(size)
        end = self.line_end(0, size)
        return bytes(memoryview(self._buffer)[: size if end < 0 else end])

    def take(self, count: int) -> bytes:
        data = bytes(memoryview(self._buffer)[:count])
        del self._buffer[:count]
        self.line += count_lines(data)
        return data

    def _behind(self, end: int) -> int:
        """The place behind the line end at `end`, which may have two bytes."""
        if self._buffer[end] == _NEWLINE:
            return end + 1
        self._fill(end + 2)
        return end + 1 + (self._buffer[end + 1 : end + 2] == b"\n")

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size and not self._ended:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._ended = True
            else:
                self._buffer += chunk
