"""Checkpoint folders on a local (or shared) file system: published by one atomic rename, through to the disk.

A folder that replaces another one is exchanged with it in a single system call where Linux offers that; elsewhere the
old one is moved aside first, and `recover` puts it back if the process died in between. Names of unfinished folders
start with a dot and are never digits, so no search for checkpoints finds them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint.diskfile import FileRecord
from internlm_ds.errors import CheckpointError

TEMPORARY = ".tmp-"
CONVERTING = ".converting-"  # not a run's: `recover` leaves it alone
REPLACED = ".replaced-"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class LocalStorage:
    """`Storage` of plain folders."""

    def __init__(self) -> None:
        self._held: dict[Path, int | None] = {}

    def exists(self, path: Path) -> bool:
        return path.exists()

    def make_temporary(self, final: Path, *, prefix: str = TEMPORARY) -> Path:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = final.parent / f"{prefix}{final.name}-{secrets.token_hex(4)}"
        if prefix == TEMPORARY:
            folder.mkdir()
            return folder
        # nobody holds the save folder's lock for these: each carries its own, and who is alone removes dead ones
        with _alone(final.parent):
            for leftover in sorted(final.parent.glob(f"{prefix}*")):
                if (descriptor := _locked(leftover)) is not None:
                    self.remove(leftover)
                    os.close(descriptor)
            folder.mkdir()
            self._held[folder] = _locked(folder)
        return folder

    def deliver(self, temporary: Path, final: Path, files: Mapping[str, FileRecord]) -> None:
        return None  # every rank writes into the folder that is published

    def arrived(self, temporary: Path, final: Path) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in temporary.iterdir()}

    def publish(self, temporary: Path, final: Path) -> None:
        sync_folder(temporary)
        if not final.exists():
            os.rename(temporary, final)
        elif exchange(temporary, final):
            self.remove(temporary)
        else:
            aside = final.parent / f"{REPLACED}{final.name}-{secrets.token_hex(4)}"
            os.rename(final, aside)
            os.rename(temporary, final)
            self.remove(aside)
        sync_folder(final.parent)
        self._free(temporary)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        self._free(path)

    def published(self, parent: Path) -> list[str]:
        return sorted(path.name for path in parent.iterdir() if path.is_dir() and _is_good(path))

    def discard(self, final: Path) -> None:
        """Remove a published folder: gone from its place at once, so that no half of it is ever found there."""
        aside = final.parent / f"{TEMPORARY}{final.name}-{secrets.token_hex(4)}"
        os.rename(final, aside)
        self.remove(aside)

    def _free(self, path: Path) -> None:
        if (descriptor := self._held.pop(path, None)) is not None:
            os.close(descriptor)

    def recover(self, parent: Path) -> list[str]:
        done = []
        for aside in sorted(parent.glob(f"{REPLACED}*")):
            final = parent / aside.name[len(REPLACED) :].rsplit("-", 1)[0]
            if final.exists():
                self.remove(aside)
            else:
                os.rename(aside, final)
                done.append(f"{final} was being replaced when its writer died: the old one is back")
        for leftover in sorted(parent.glob(f"{TEMPORARY}*")):
            self.remove(leftover)
            done.append(f"{leftover} was unfinished: removed")
        return done


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Alone among the processes that make folders here with a lock of their own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> int | None:
    """An open folder with its lock, which the kernel frees when this process ends; None if another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_good(folder: Path) -> bool:
    """Its manifest can be read, and is of the step that the folder is named after."""
    try:
        step = manifests.read(folder).step
    except CheckpointError:
        return False
    return not folder.name.isdigit() or step == int(folder.name)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the system or file system cannot.

    Source: renameat2(2) with RENAME_EXCHANGE.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
