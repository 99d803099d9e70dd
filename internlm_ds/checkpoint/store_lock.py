"""One run at a time writes a prefix of an object store: an object that says which, and that ages when its owner dies.

The store decides who was first (a write that succeeds only where nothing is). A live owner writes it anew every minute;
ten minutes without, or a process of this host that is gone, and it counts as dead.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from internlm_ds.checkpoint.lock import NAME, TOUCH_EVERY_S, is_alive, process_start
from internlm_ds.checkpoint.storage.s3 import S3Store
from internlm_ds.errors import CheckpointError

log = logging.getLogger(__name__)


class StoreLock:
    """The lock of a save folder in a store, held by this process until `release`.

    Raises:
        CheckpointError: A live run holds it.
    """

    def __init__(self, store: S3Store, *, clock: Callable[[], float] = time.time):
        self._store, self._clock = store, clock
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "process": process_start(os.getpid())}
        self._take()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="store-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the prefix free; what another run has taken in the meantime is left alone."""
        self._released.set()
        self._thread.join()
        if _owner(self._held()) == self._owner:
            self._store.remove_file("", NAME)

    def _take(self) -> None:
        for _ in range(3):
            if self._store.write("", NAME, self._content(), only_new=True):
                return
            held = self._held()
            age_s = self._clock() - float(held.get("seen", 0.0))
            if is_alive(_owner(held), own_host=self._owner["host"], age_s=age_s):
                raise CheckpointError(
                    f"save folder {self._store.shown('')} is in use by another run: process {held.get('pid', '?')} on "
                    f"{held.get('host', '?')}, last seen {age_s:.0f} s ago. Give this run another "
                    f"ckpt.save_ckpt_folder, or wait for that one; if it is dead, remove {self._store.shown('', NAME)}"
                )
            log.warning("%s was left behind by a run that is dead: taken over", self._store.shown("", NAME))
            self._store.remove_file("", NAME)
        raise CheckpointError(f"{self._store.shown('', NAME)} is taken by other runs again and again")

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "seen": self._clock()}).encode()

    def _held(self) -> dict[str, Any]:
        try:
            held = json.loads(self._store.read("", NAME) or b"{}")
        except ValueError:
            return {}
        return held if isinstance(held, dict) else {}

    def _keep_alive(self) -> None:
        while not self._released.wait(TOUCH_EVERY_S):
            try:
                self._store.write("", NAME, self._content())
            except CheckpointError as error:
                log.warning("%s", error)


def _owner(held: dict[str, Any]) -> dict[str, Any]:
    return {key: held.get(key) for key in ("host", "pid", "process")}
