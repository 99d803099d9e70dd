"""Files that are on the disk when they are closed, their checksum taken on the way.

A large file is written straight from the caller's memory in pieces; a thread takes the checksum beside it (hashlib and
write both leave the interpreter's lock), its place is reserved first and the disk is put to work while the rest is
still being written. That is worth as much as the checksum costs: a plain write begins to reach the disk only when the
caller asks for all of it at the end. Small files are simply written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PIECE_BYTES = 4 * 2**20
SYNC_BYTES = 32 * 2**20
LARGE_BYTES = 2 * PIECE_BYTES
WAITING_PIECES = 8  # for the checksum: what they lie in stays in memory
_SYNC_FILE_RANGE_WRITE = 2
_NOT_OFFERED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


@dataclass(frozen=True)
class FileRecord:
    """One file as it was meant to be written: its size in bytes and its sha256 in hex."""

    size: int
    sha256: str


class HashedFile:
    """A new file: written, hashed, and on the disk when the `with` block ends without an error.

    Memory handed to `write` must not change before the block ends.

    Args:
        size: Of the whole file in bytes, if it is known.
        flush: Who waits until it is on the disk; None: the end of the block does.
    Raises:
        OSError: The file exists, or the disk is full (known at once where `size` is given).
    """

    def __init__(self, path: Path, *, size: int = 0, flush: Flush | None = None):
        self._flush = flush
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._is_large = size >= LARGE_BYTES
        self._digest = _ThreadedDigest() if self._is_large else hashlib.sha256()
        self._size = self._sent = 0
        if self._is_large:
            with self._closed_on_error():
                reserve(self._descriptor, size)

    def write(self, data: bytes | memoryview) -> None:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES]
            self._digest.update(piece)
            _write_all(self._descriptor, piece)
            self._size += len(piece)
            if self._is_large and self._size - self._sent >= SYNC_BYTES:
                start_writing(self._descriptor, self._sent, self._size - self._sent)
                self._sent = self._size

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with self._closed_on_error():
            if kind is None and self._flush is None:
                os.fsync(self._descriptor)
            self._hex = self._digest.hexdigest()
        if kind is None and self._flush is not None:
            start_writing(self._descriptor, self._sent, 0)
            self._flush.take(self._descriptor)
        else:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._digest.hexdigest()
            os.close(self._descriptor)
            raise

    @property
    def record(self) -> FileRecord:
        """Of the closed file."""
        return FileRecord(size=self._size, sha256=self._hex)


class Flush:
    """Files that are waited for together: the end of the `with` block brings all of them to the disk.

    One file is written while the one before it still goes to the disk, and small ones cost next to nothing.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def take(self, descriptor: int) -> None:
        """Wait for this open file at the end, and close it."""
        self._descriptors.append(descriptor)

    def __enter__(self) -> Flush:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            for descriptor in self._descriptors if kind is None else ():
                os.fsync(descriptor)
        finally:
            for descriptor in self._descriptors:
                os.close(descriptor)


class _ThreadedDigest:
    """A sha256 that another thread works at; `hexdigest` waits for it and ends the thread."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._pieces: queue.Queue[bytes | memoryview | None] = queue.Queue(WAITING_PIECES)
        self._thread = threading.Thread(target=self._work, name="checksum", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._sha.update(piece)
            del piece  # the next one may be long in coming

    def update(self, piece: bytes | memoryview) -> None:
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()
        return self._sha.hexdigest()


def write_bytes(path: Path, data: bytes, *, flush: Flush | None = None) -> FileRecord:
    """Write a small file through to the disk."""
    with HashedFile(path, flush=flush) as file:
        file.write(data)
    return file.record


def digest(path: Path) -> FileRecord:
    """Size and checksum of a file as it lies on the disk; a large one is read and hashed side by side."""
    size = 0
    with open(path, "rb", buffering=0) as file:
        sha = _ThreadedDigest() if os.fstat(file.fileno()).st_size >= LARGE_BYTES else hashlib.sha256()
        try:
            while piece := file.read(PIECE_BYTES):
                sha.update(piece)
                size += len(piece)
        finally:
            found = sha.hexdigest()
    return FileRecord(size=size, sha256=found)


def reserve(descriptor: int, size: int) -> None:
    """Give a new file its place on the disk; nothing happens where the file system cannot.

    Raises:
        OSError: There is no room.
    Source: fallocate(2); not posix_fallocate, which writes zeros where the file system cannot.
    """
    function = _libc("fallocate")
    if function is None or function(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    code = ctypes.get_errno()
    if code not in _NOT_OFFERED:
        raise OSError(code, os.strerror(code))


def start_writing(descriptor: int, start: int, size: int) -> None:
    """Let the system begin to write a part of a file to the disk, and do not wait for it; size 0: to its end.

    Source: sync_file_range(2) with SYNC_FILE_RANGE_WRITE.
    """
    function = _libc("sync_file_range")
    if function is not None:
        function(descriptor, ctypes.c_int64(start), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def _libc(name: str) -> ctypes._FuncPointer | None:
    """A function of the C library that not every system has."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
