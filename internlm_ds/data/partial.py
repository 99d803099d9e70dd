"""An output that is not whole yet: a hidden folder beside it, one writer at a time, a journal, the move into place.

The folder of `cn/x.bin` is `cn/.x.bin.partial`. What lies in it has no name that a reader of data sets looks for. A
killed process leaves it behind; the next writer of the same output goes on from the journal, or clears it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_ds.data.binformat import sync_folder, write_whole
from internlm_ds.errors import DataFormatError

_LOCK, _JOURNAL = "lock", "journal.json"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class PartialOutput:
    """The hidden folder of an output, held by this process from `open` until `publish`, `discard` or `leave`.

    Attributes:
        output: The file that will appear.
        folder: Where its parts grow.
    """

    def __init__(self, output: str | os.PathLike[str]):
        self.output = Path(output)
        self.folder = self.output.with_name(f".{self.output.name}.partial")
        self._lock = -1

    def open(self) -> None:
        """Make the folders, take the lock.

        Raises:
            DataFormatError: Another process writes the same output.
        """
        self.output.parent.mkdir(parents=True, exist_ok=True)
        while self._lock < 0:
            self.folder.mkdir(exist_ok=True)
            # the one that held the lock may just have moved everything away: then this is not the lock any more
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
                self._lock = handle if self._take(handle) else -1

    def _take(self, handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            message = "another process is writing this output; wait for it, or name another output"
            raise DataFormatError(message, path=str(self.output)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(handle)
                raise
        try:
            if os.path.samestat(os.fstat(handle), os.stat(self.folder / _LOCK)):
                return True
        except FileNotFoundError:
            pass
        os.close(handle)
        return False

    def path(self, name: str) -> Path:
        return self.folder / name

    def read_journal(self) -> dict[str, Any] | None:
        """What was written last, None where nothing usable was."""
        try:
            found = json.loads(self.path(_JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_journal(self, content: Mapping[str, Any]) -> None:
        """Replace the journal; it is on disk afterwards. The caller has brought to disk what it speaks of."""
        write_whole(self.path(_JOURNAL), json.dumps(content).encode())
        sync_folder(self.folder)

    def clear(self) -> None:
        """Remove what an earlier process left, but for the lock."""
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def move(self, moves: Sequence[tuple[str, Path]]) -> None:
        """Rename parts into place, in order; those that are there already are passed over."""
        for name, target in moves:
            if self.path(name).exists():
                os.replace(self.path(name), target)
        sync_folder(self.output.parent)

    def discard(self) -> None:
        """Leave nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.leave()

    def leave(self) -> None:
        """Keep the parts for a later process."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
