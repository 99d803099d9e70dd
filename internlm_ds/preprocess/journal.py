"""How far a run has come, on disk beside its hidden parts, so that another process goes on from there.

The journal claims only what has been brought to disk before. A thread of its own does that, so the run does not wait.
Fields: `plan` (what the run is: inputs, model, options), `stage` ("writing" or "publishing"), and for "writing"
`shards` and `tallies` (see `shards.Shards.state`), `done` (sources read to their end), `source`, `pieces` and `crc`
(how much of the next one is in the bins, and the check sum of so much text).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from internlm_ds.data.partial import PartialOutput
from internlm_ds.errors import DataFormatError

INTERVAL_S = 5.0


class Journal:
    """Writes down the state of a run every few seconds.

    Args:
        plan: What makes the run what it is; another process must have the same.
    """

    def __init__(
        self,
        partial: PartialOutput,
        plan: Mapping[str, Any],
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._partial, self._plan, self._interval_s, self._clock = partial, plan, interval_s, clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: Future[None] | None = None
        self._last = clock()

    def is_due(self) -> bool:
        """Time to note the state, and the last note is on disk."""
        if self._pending is not None and self._pending.done():
            self._pending.result()
        return self._clock() - self._last >= self._interval_s and (self._pending is None or self._pending.done())

    def note(self, state: Mapping[str, Any], handles: tuple[int, ...]) -> None:
        """Bring the files behind `handles` to disk, then write the state; closes the handles."""
        self._last = self._clock()
        self._pending = self._thread.submit(self._write, {"plan": self._plan, "stage": "writing", **state}, handles)

    def _write(self, content: Mapping[str, Any], handles: tuple[int, ...]) -> None:
        try:
            for handle in handles:
                os.fdatasync(handle)
        finally:
            for handle in handles:
                os.close(handle)
        self._partial.write_journal(content)

    def publishing(self, *, count: int) -> None:
        """All `count` bins are whole and on disk: from here on only names change."""
        self.stop()
        self._partial.write_journal({"plan": self._plan, "stage": "publishing", "count": count})

    def stop(self) -> None:
        self._thread.shutdown(wait=True)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two plans, in the words of the command line."""
    return [_difference(key, then.get(key), value) for key, value in now.items() if then.get(key) != value]


def _difference(key: str, then: Any, now: Any) -> str:
    if isinstance(then, list) and isinstance(now, list):
        changes = [f"{_shown(gone)} not any more" for gone in then if gone not in now]
        changes += [f"{_shown(new)} is new" for new in now if new not in then]
        return f"{key}: {', '.join(changes[:4]) or 'another order'}"
    return f"{key} was {_shown(then)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def check_same_plan(then: Mapping[str, Any], now: Mapping[str, Any], *, path: str) -> None:
    """Refuse to go on with what was begun otherwise.

    Raises:
        DataFormatError: Names what has changed.
    """
    if changed := differences(then, now):
        message = f"cannot resume: {'; '.join(changed)}. Use what it was begun with, or start over without --resume"
        raise DataFormatError(message, path=path)
