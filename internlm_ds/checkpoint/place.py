"""Folders of checkpoints to read from, wherever they lie: found there, and brought to this host when they are used.

A local folder is read where it is. Of an object store only names and manifests are looked at while a checkpoint is
searched for; the one that is taken is brought over whole, once for each host, and stays there for the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.search import Candidate, find_checkpoints
from internlm_ds.checkpoint.storage import base
from internlm_ds.checkpoint.storage.s3 import MANIFEST, S3Store
from internlm_ds.errors import CheckpointError

INDEX, BROUGHT = ".index", ".brought"


class Place(Protocol):
    """A folder of checkpoints, or a checkpoint's own folder."""

    def folder(self) -> Path | None:
        """A local folder with the names of its files, and the content of manifests; None if it does not exist."""

    def candidates(self) -> list[Candidate]:
        """Checkpoints below it, the newest first."""

    def bring(self, path: Path) -> Path:
        """The folder of a candidate (or `folder()` itself) on this host, whole. Called by every rank that reads it."""


def of(text: str, *, staging: str | None = None) -> Place:
    """The place that an address names.

    Raises:
        CheckpointError: The address cannot be read, or its backend not be used.
    """
    address = addresses.parse(text)
    base.check(address)
    if address.backend == "local":
        return LocalPlace(address.local_path)
    return StorePlace(S3Store(address), base.local_counterpart(address, staging=staging))


class LocalPlace:
    """A folder of this host's file system."""

    def __init__(self, path: Path):
        self.path = path

    def folder(self) -> Path | None:
        return self.path if self.path.is_dir() else None

    def candidates(self) -> list[Candidate]:
        return find_checkpoints(self.path)

    def bring(self, path: Path) -> Path:
        return path


class StorePlace:
    """A prefix of an S3 store.

    Args:
        root: Local counterpart; an index and what was brought lie in it.
    """

    def __init__(self, store: S3Store, root: Path):
        self.store, self.root = store, root

    def folder(self) -> Path | None:
        """The index: an empty file for every object, manifests with their content."""
        names = {name for name in self.store.files() if not _is_hidden(name)}
        index = self.root / INDEX
        shutil.rmtree(index, ignore_errors=True)
        for name in sorted(names):
            path = index / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if path.name in (MANIFEST, "config.json"):
                where, _, file = name.rpartition("/")
                path.write_bytes(self.store.read(where, file) or b"")
        return index if names else None

    def candidates(self) -> list[Candidate]:
        folder = self.folder()
        return find_checkpoints(folder) if folder is not None else []

    def bring(self, path: Path) -> Path:
        name = path.relative_to(self.root / INDEX).as_posix()
        name = "" if name == "." else name
        target = self.root / BROUGHT / name if name else self.root / BROUGHT / "_"
        target.mkdir(parents=True, exist_ok=True)
        with _alone(target):  # the ranks of a host wait for the first of them
            present = {file for file in self.store.files(name) if not _is_hidden(file)}
            if not present:
                raise CheckpointError(f"{self.store.shown(name)} is not there any more")
            for stale in [file for file in target.rglob("*") if file.is_file()]:
                if stale.relative_to(target).as_posix() not in present:
                    stale.unlink()
            self.store.download(name, target, names=sorted(present))
        return target


def localized(text: str, *, staging: str | None = None) -> Path:
    """The folder of one checkpoint on this host; an address of a store is brought over.

    Raises:
        CheckpointError: Nothing lies there, or the store fails.
    """
    place = of(text, staging=staging)
    if isinstance(place, LocalPlace):
        return place.path
    folder = place.folder()
    if folder is None:
        raise CheckpointError(f"{text} does not exist: no object's name begins so")
    return place.bring(folder)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with open(folder.parent / f".{folder.name}.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
