"""How far a long preprocessing run is: one rewritten line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO


class Progress:
    """Rate, share done and time left of a run over input bytes.

    Args:
        total_bytes: Size of all inputs together.
        stream: Where the lines go; None shows nothing.
        clock: Seconds, rising.
        earlier_bytes: Done by an earlier process: they count for the share, not for the rate.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        stream: IO[str] | None,
        clock: Callable[[], float] = time.monotonic,
        earlier_bytes: int = 0,
    ):
        self._total, self._stream, self._clock, self._earlier = total_bytes, stream, clock, earlier_bytes
        self._terminal = stream is not None and stream.isatty()
        self._interval_s = 0.2 if self._terminal else 30.0
        self._start = self._last = clock()
        self._shown = False

    def update(self, done_bytes: int, *, tokens: int) -> None:
        """Show the state if the last showing is long enough ago."""
        now = self._clock()
        if self._stream is None or now - self._last < self._interval_s:
            return
        self._last, self._shown = now, True
        elapsed_s, earlier = now - self._start, self._earlier
        line = progress_line(done_bytes, self._total, tokens=tokens, elapsed_s=elapsed_s, earlier_bytes=earlier)
        self._stream.write(f"\r\033[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()

    def finish(self) -> None:
        """Clear the terminal's line, so that what follows stands alone."""
        if self._stream is not None and self._terminal and self._shown:
            self._stream.write("\r\033[K")
            self._stream.flush()


def progress_line(done_bytes: int, total_bytes: int, *, tokens: int, elapsed_s: float, earlier_bytes: int = 0) -> str:
    """One line of state.

    >>> progress_line(25_000_000, 100_000_000, tokens=6_000_000, elapsed_s=10.0)
    '25% of 100.0 MB, 2.5 MB/s, 600000 tokens/s, 30 s left'
    """
    share = done_bytes / total_bytes if total_bytes else 1.0
    rate = (done_bytes - earlier_bytes) / elapsed_s if elapsed_s else 0.0
    left = f"{(total_bytes - done_bytes) / rate:.0f} s left" if rate else "time left unknown"
    token_rate = tokens / elapsed_s if elapsed_s else 0.0
    return f"{share:.0%} of {total_bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {token_rate:.0f} tokens/s, {left}"
