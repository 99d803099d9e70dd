"""SIGTERM and SIGINT: finish the step, save, exit with 128 + the signal's number."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from internlm_ds.parallel.comm import ProcessComm

# a terminal and the launcher both pass a Ctrl-C on; a second one within this time is the same one
SAME_INTERRUPT_S = 2.0


class SignalWatch:
    """Remembers the first signal.

    Further SIGTERMs change nothing: a launcher, a time limit and a batch system often send one each, and who wants no
    checkpoint has SIGKILL. A second Ctrl-C, some time after the first, ends the process at once.

    Args:
        comm: Over all ranks.
        launcher_is_gone: Asked after every batch; a launcher that died unnoticed counts as SIGTERM.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        comm: ProcessComm,
        *,
        launcher_is_gone: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._comm, self._launcher_is_gone, self._clock = comm, launcher_is_gone, clock
        self._since = 0.0
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over SIGTERM and SIGINT of this process while a run lasts; main thread only."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            # a rank whose run has failed must end when its launcher says so
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self.received is None:
            self.received, self._since = signal.Signals(number), now
        elif number == signal.SIGINT and now - self._since > SAME_INTERRUPT_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    def should_stop(self) -> bool:
        """Has a signal reached any rank? One answer for all: called by all after every batch."""
        if self.received is None and self._launcher_is_gone():
            self.received = signal.SIGTERM
        # SIGTERM has the higher number: if different ones arrived, it is the one that all go by
        number = self._comm.largest(int(self.received or 0))
        self.agreed = signal.Signals(number) if number else None
        return self.agreed is not None

    @property
    def exit_code(self) -> int:
        """Of a run that stopped for a signal, the same on every rank; 0 without one."""
        return 128 + int(self.agreed) if self.agreed is not None else 0
