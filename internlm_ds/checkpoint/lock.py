"""One run at a time writes a save folder: a lock file that says which, and that ages when its owner dies.

On the machine that wrote it, a lock is alive exactly as long as its process is. From another machine one sees only
that a live owner touches it every minute: ten minutes without a touch, and it counts as dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internlm_ds.errors import CheckpointError

log = logging.getLogger(__name__)

NAME = ".lock"
TOUCH_EVERY_S = 60.0
DEAD_AFTER_S = 600.0


class FolderLock:
    """The lock of a save folder, held by this process until `release`.

    Raises:
        CheckpointError: A live run holds it; the message names that run and says what to do.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time):
        self.path = folder / NAME
        folder.mkdir(parents=True, exist_ok=True)
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "process": process_start(os.getpid())}
        self._take(clock())
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="checkpoint-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder free; what another run has taken in the meantime is left alone."""
        self._released.set()
        if _read(self.path) == self._owner:
            self.path.unlink(missing_ok=True)

    def _take(self, now: float) -> None:
        for _ in range(3):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._clear_if_dead(now)
                continue
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._owner, file)
            return
        raise CheckpointError(
            f"{self.path} is taken by other runs again and again; only one run may write a save folder"
        )

    def _clear_if_dead(self, now: float) -> None:
        # one at a time: two runs that both find it dead must not remove each other's new lock
        with _takeover(self.path):
            owner = _read(self.path)
            try:
                age_s = now - self.path.stat().st_mtime
            except FileNotFoundError:
                return
            if is_alive(owner, own_host=self._owner["host"], age_s=age_s):
                raise CheckpointError(
                    f"save folder {self.path.parent} is in use by another run: process {owner.get('pid', '?')} on "
                    f"{owner.get('host', '?')}, last seen {age_s:.0f} s ago. Give this run another "
                    f"ckpt.save_ckpt_folder, or wait for that one; if it is dead, remove {self.path}"
                )
            log.warning("%s was left behind by a run that is dead (%s): taken over", self.path, owner)
            self.path.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._released.wait(TOUCH_EVERY_S):
            try:
                os.utime(self.path)
            except OSError:
                return  # the folder is gone: the next save will say so


@contextlib.contextmanager
def _takeover(path: Path) -> Iterator[None]:
    """Alone among all processes and threads that look at a lock they did not get; the kernel frees it if one dies."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def is_alive(owner: dict[str, Any], *, own_host: str, age_s: float) -> bool:
    """Whether the process that a lock names still runs, as far as `own_host` can see."""
    if owner.get("host") != own_host or not isinstance(owner.get("pid"), int):
        return age_s < DEAD_AFTER_S
    return owner.get("process") == process_start(owner["pid"])


def process_start(pid: int) -> str | None:
    """A text that no other process of this machine ever has: boot and start time; None if there is no such process.

    Source: proc(5), field 22 of `/proc/PID/stat`.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return _exists_without_proc(pid)
    # a zombie has ended, though nobody has asked for its exit code yet
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"


def _exists_without_proc(pid: int) -> str | None:
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return f"pid:{pid}"
    return f"pid:{pid}"
