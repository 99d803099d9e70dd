"""Which rank failed first, known to all: a key in the job's store, and a thread on each rank that looks at it.

A rank that raises leaves its peers waiting in a collective. gloo notices when the other process is gone, NCCL only
after its time limit, and a launcher that would end the others need not exist. So the rank that fails says so in the
store before it ends; a peer learns it from its watch, or when its own collective breaks, and can name the cause
instead of what followed from it.

What a process prints, and its end, are `train.failure`'s.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch.distributed as dist

POLL_S = 1.0
# a peer whose collective broke says so itself within this time
GRACE_S = 3.0
# a failed rank waits so long for the others to have noted the cause; most need a poll
LINGER_S = 10.0
KEY, SEEN = "first", "seen"


@dataclass(frozen=True)
class Failure:
    """Why the job ends.

    Attributes:
        rank: That failed first.
        text: Class and message of its error.
        exit_code: Of its process, and of all others.
    """

    rank: int
    text: str
    exit_code: int


class FirstFailure:
    """This rank's view of the job's first failure.

    Args:
        store: The job's; used through a connection of its own, as the main thread may be waiting on the other.
        rank, world_size: This process' place.
        poll_s: Between two looks of the watch.
        grace_s: From learning of a failure until the watch acts on it.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, poll_s: float = POLL_S, grace_s: float = GRACE_S
    ):
        self._store = dist.PrefixStore("internlm_ds/failure", store.clone())
        self._rank, self._world_size, self._poll_s, self._grace_s = rank, world_size, poll_s, grace_s
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._note: Callable[[Failure], None] = lambda failure: None
        self.failure: Failure | None = None

    @classmethod
    def of_job(cls, *, rank: int, world_size: int) -> FirstFailure:
        """Over the store that the default process group was made with."""
        return cls(dist.distributed_c10d._get_default_store(), rank=rank, world_size=world_size)

    def watch(
        self, on_failure: Callable[[Failure], None], *, note: Callable[[Failure], None] = lambda failure: None
    ) -> None:
        """Look from now on, in another thread.

        Args:
            on_failure: Called when a peer has failed and this rank still lives after the grace.
            note: Called once, as soon as this rank knows that a peer has failed, and before the peer may be gone.
        """
        self._note = note
        arguments = (on_failure,)
        self._thread = threading.Thread(target=self._watch, args=arguments, name="internlm-ds-failures", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more: this rank ends by itself. The thread is gone when this returns."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def report(self, text: str, *, exit_code: int) -> Failure:
        """This rank fails, and its watch ends: the job's first failure, which is this one if no other was earlier."""
        self._stopped.set()
        own = Failure(self._rank, text, exit_code)
        try:
            with self._lock:
                if self.failure is None:
                    self._learn(self._store.compare_set(KEY, "", json.dumps(asdict(own))))
        except RuntimeError:  # the store went with its rank, which said nothing: nobody else will tell
            self.failure = self.failure or own
        return self.failure or own

    def linger(self) -> None:
        """Wait, for seconds at most, until all ranks know.

        The rank that failed first does, as some launchers end the others once it is gone, before they could note why;
        so does rank 0, which most often holds the store.
        """
        if self._rank not in (0, self.failure.rank if self.failure else 0):
            return
        deadline = time.monotonic() + LINGER_S
        try:
            while time.monotonic() < deadline and self._store.add(SEEN, 0) < self._world_size:
                threading.Event().wait(0.02)
        except RuntimeError:
            return

    def _watch(self, on_failure: Callable[[Failure], None]) -> None:
        try:
            while not self._stopped.wait(self._poll_s):
                with self._lock:
                    if self.failure is None and self._store.check([KEY]):
                        self._learn(self._store.get(KEY))
                if self.failure is not None:
                    break
        except RuntimeError:
            return  # the rank that held the store has ended: in the end one has to be the first
        if self.failure is not None and not self._stopped.wait(self._grace_s):
            on_failure(self.failure)

    def _learn(self, value: bytes) -> None:
        self.failure = Failure(**json.loads(value))
        if self.failure.rank != self._rank:
            self._note(self.failure)
        self._store.add(SEEN, 1)
