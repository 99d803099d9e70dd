"""What the checkpoint room asks of a place where folders are written; one implementation per backend.

A backend publishes a folder whole or not at all. Paths are those of a local file system: an object store's folders
have a local counterpart, from which they are sent.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from internlm_ds.checkpoint.address import Address, boto3_equivalent
from internlm_ds.checkpoint.diskfile import FileRecord
from internlm_ds.errors import CheckpointError


class Storage(Protocol):
    """Folders by path; all methods may raise OSError and CheckpointError."""

    def exists(self, path: Path) -> bool: ...

    def make_temporary(self, final: Path, *, prefix: str = ...) -> Path:
        """A new empty folder beside `final`, from which `publish` can move; its name begins with `prefix`."""

    def deliver(self, temporary: Path, final: Path, files: Mapping[str, FileRecord]) -> None:
        """Called by every rank once it has written these files into `temporary`."""

    def arrived(self, temporary: Path, final: Path) -> dict[str, int]:
        """Files of `temporary` that rank 0 sees, delivered ones included, with their sizes in bytes."""

    def publish(self, temporary: Path, final: Path) -> None:
        """Make `final` be what `temporary` holds, at once, through to the disk; what was there before is removed."""

    def remove(self, path: Path) -> None:
        """Remove a folder and what is in it; nothing happens if it is not there."""

    def published(self, parent: Path) -> list[str]:
        """Names of the checkpoints in `parent`, damaged ones left out as far as names and manifests tell."""

    def discard(self, path: Path) -> None:
        """Remove a checkpoint so that no half of it is ever taken for one."""

    def recover(self, parent: Path) -> list[str]:
        """Undo what an interrupted `publish` left in `parent`; says what was done."""


def of(address: Address, *, staging: str | None = None) -> Storage:
    """The storage that an address names.

    Args:
        staging: Folder in which what goes to an object store is put together.
    Raises:
        CheckpointError: A backend that this version cannot use.
    """
    check(address)
    if address.backend == "boto3":
        from internlm_ds.checkpoint.storage.s3 import S3Store
        from internlm_ds.checkpoint.storage.s3_folder import S3Storage

        return S3Storage(S3Store(address), local_counterpart(address, staging=staging))
    from internlm_ds.checkpoint.storage.local import LocalStorage

    return LocalStorage()


def check(address: Address) -> None:
    """Raise `CheckpointError` for a backend that this version cannot use."""
    if address.backend in ("volc", "oss2"):
        raise CheckpointError(
            f"{address.text}: {address.backend} is not supported; its store speaks S3's protocol: write "
            f"{boto3_equivalent(address)}"
        )


def local_counterpart(address: Address, *, staging: str | None = None) -> Path:
    """The local folder of an address: itself, or where an object store's files are put together and read from."""
    if address.backend == "local":
        return address.local_path
    name = hashlib.sha256(f"{address.endpoint}/{address.bucket}/{address.key}".encode()).hexdigest()[:16]
    return Path(staging or Path(tempfile.gettempdir()) / "internlm_ds") / name
