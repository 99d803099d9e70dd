"""SIGTERM and SIGINT: finish the step, save, exit with 128 + the signal's number."""

from __future__ import annotations

import signal
from types import FrameType

from internlm_ds.parallel.comm import ProcessComm


class SignalWatch:
    """Remembers the first signal; a second one of the same kind acts as it would have without us."""

    def __init__(self, comm: ProcessComm):
        self._comm = comm
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take over SIGTERM and SIGINT of this process; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)

    def should_stop(self) -> bool:
        """Has a signal reached any rank? One answer for all: called by all after every batch."""
        return self._comm.any(self.received is not None)

    @property
    def exit_code(self) -> int:
        """Of a run that stopped for a signal; a rank that got none itself follows SIGTERM."""
        return 128 + int(self.received or signal.SIGTERM)
