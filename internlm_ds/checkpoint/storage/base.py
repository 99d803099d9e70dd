"""What the checkpoint room asks of a place where folders lie; one implementation per backend.

A backend publishes a folder whole or not at all. This version has local file systems only; `of` says so for the
others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from internlm_ds.checkpoint.address import Address, boto3_equivalent
from internlm_ds.errors import CheckpointError


class Storage(Protocol):
    """Folders by path; all methods may raise OSError."""

    def exists(self, path: Path) -> bool: ...

    def make_temporary(self, final: Path, *, prefix: str = ...) -> Path:
        """A new empty folder beside `final`, from which `publish` can move; its name begins with `prefix`."""

    def publish(self, temporary: Path, final: Path) -> None:
        """Make `final` be what `temporary` holds, at once, through to the disk; what was there before is removed."""

    def remove(self, path: Path) -> None:
        """Remove a folder and what is in it; nothing happens if it is not there."""

    def recover(self, parent: Path) -> list[str]:
        """Undo what an interrupted `publish` left in `parent`; says what was done."""


def of(address: Address) -> Storage:
    """The storage that an address names.

    Raises:
        CheckpointError: A backend that this version cannot use.
    """
    if address.backend in ("volc", "oss2"):
        raise CheckpointError(
            f"{address.text}: {address.backend} is not supported; its store speaks S3's protocol: write "
            f"{boto3_equivalent(address)}"
        )
    if address.backend != "local":
        raise CheckpointError(
            f"{address.text}: {address.backend} storage is not built into this version of internlm-ds; only local "
            "folders work: write local:/path or a plain path (a mounted bucket is one too)"
        )
    from internlm_ds.checkpoint.storage.local import LocalStorage

    return LocalStorage()
