"""Arrays on disk that can be made again: written whole or not at all, mapped when read, never trusted blindly.

A cache file is one line of JSON (what it was made from, which arrays follow) and the arrays. All ranks and workers of a
machine share its pages. Who makes one first lets the others wait, so the work is done once; where nothing can be
locked or written, everybody works for himself. What is cached, and when it is stale, is the caller's to say.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

_MAGIC = "internlm-ds cache 1"
_ALIGNMENT = 64
_POLL_S, _PATIENCE_S = 0.02, 600.0


@dataclass(frozen=True)
class ArraySpec:
    """An array to write: its type, its length, and its values in pieces, so that it need never be whole in memory."""

    dtype: str
    length: int
    pieces: Iterable[npt.NDArray[Any]]


@dataclass(frozen=True)
class CacheFile:
    """A cache file that was found.

    Attributes:
        path: Where.
        key: What it was made from, as the writer gave it.
        arrays: By name, read-only, mapped.
    """

    path: str
    key: Mapping[str, Any]
    arrays: Mapping[str, npt.NDArray[Any]]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_read_again, (self.path,))  # another process maps it itself


def read(path: str) -> CacheFile | None:
    """The cache file at `path`; None if there is none, or none that is whole."""
    try:
        with open(path, "rb") as file:
            head = json.loads(file.readline(1 << 16))
            if head.get("format") != _MAGIC or os.fstat(file.fileno()).st_size != head["size"]:
                return None
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {
            name: np.frombuffer(mapping, dtype=dtype, count=length, offset=offset)
            for name, dtype, length, offset in head["arrays"]
        }
        return CacheFile(path, head["key"], arrays)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(path: str, key: Mapping[str, Any], arrays: Mapping[str, ArraySpec]) -> None:
    """Write a cache file; it appears whole, under its name, or not at all.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    head, places = _head(key, arrays)
    temporary = f"{path}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(head)
            for name, spec in arrays.items():
                file.seek(places[name])
                for piece in spec.pieces:
                    file.write(np.ascontiguousarray(piece, dtype=spec.dtype).data)
            file.truncate(json.loads(head)["size"])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def places(path: str, suffix: str) -> list[str]:
    """Where a cache of the file `path` may lie: hidden beside it, else in the user's cache folder."""
    folder, name = os.path.split(os.path.realpath(path))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    whole = os.path.join(folder, name).replace(os.sep, "%")
    return [os.path.join(folder, f".{name}{suffix}"), os.path.join(home, "internlm_ds", f"{whole[-180:]}{suffix}")]


def write_somewhere(
    candidates: Iterable[str], key: Mapping[str, Any], arrays: Callable[[], Mapping[str, ArraySpec]]
) -> str | None:
    """Write to the first place that takes it; returns that place, None if there is none."""
    for place in candidates:
        try:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            write(place, key, arrays())
            return place
        except OSError as error:
            logger.debug("no cache at %s: %s", place, error)
    return None


@contextlib.contextmanager
def one_at_a_time(path: str, *, ready: Callable[[], object]) -> Iterator[None]:
    """Hold a lock on the file `path` (it is not written to), or go on without one once `ready()` is true.

    The lock ends with the process that holds it. On file systems that cannot lock, nobody waits.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        until = time.monotonic() + _PATIENCE_S
        while not _locked(handle) and not ready() and time.monotonic() < until:
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    """The lock is ours, or there are no locks here."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _head(key: Mapping[str, Any], arrays: Mapping[str, ArraySpec]) -> tuple[bytes, dict[str, int]]:
    """The first line, padded with blanks to a length that does not depend on the numbers in it; where arrays begin."""
    sizes = {name: np.dtype(spec.dtype).itemsize * spec.length for name, spec in arrays.items()}
    room = _aligned(len(json.dumps(key)) + 100 * (len(arrays) + 2))
    starts, at = {}, room
    for name, size in sizes.items():
        starts[name] = at
        at = _aligned(at + size)
    rows = [[name, spec.dtype, spec.length, starts[name]] for name, spec in arrays.items()]
    text = json.dumps({"format": _MAGIC, "size": at, "arrays": rows, "key": key})
    assert len(text) < room, f"a head of {len(text)} characters in {room}"
    return text.ljust(room - 1).encode("ascii") + b"\n", starts


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _read_again(path: str) -> CacheFile:
    found = read(path)
    if found is None:
        raise OSError(f"{path} was there and cannot be read any more")
    return found
