"""Checkpoint folders of an S3 store as `Storage`: written on the local disk, sent file by file, the manifest last.

Every rank sends what it wrote, from its own host; rank 0 checks that all of it has arrived, takes away what is not of
this checkpoint, and sends the manifest. A folder that is written anew loses its manifest first.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from internlm_ds.checkpoint.diskfile import FileRecord
from internlm_ds.checkpoint.storage.local import TEMPORARY
from internlm_ds.checkpoint.storage.s3 import MANIFEST, S3Store
from internlm_ds.errors import CheckpointError

_OURS = re.compile(r"(weights|optimizer|random)-rank\d{5}[-.]")


class S3Storage:
    """`Storage` of a prefix.

    Args:
        store: The prefix.
        root: Its local counterpart: `root/7` stands for `7` below the prefix.
    """

    def __init__(self, store: S3Store, root: Path):
        self.store, self.root = store, root

    def exists(self, path: Path) -> bool:
        return bool(self.store.files(self._name(path)))

    def make_temporary(self, final: Path, *, prefix: str = TEMPORARY) -> Path:
        # what is there stops being a checkpoint before a file of it is replaced
        self.store.remove_file(self._name(final), MANIFEST)
        folder = final.parent / f"{prefix}{final.name}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True)
        return folder

    def deliver(self, temporary: Path, final: Path, files: Mapping[str, FileRecord]) -> None:
        hashes = {name: record.sha256 for name, record in files.items()}
        self.store.send(temporary, self._name(final), sorted(files), hashes=hashes)
        for name in files:
            (temporary / name).unlink()

    def arrived(self, temporary: Path, final: Path) -> dict[str, int]:
        here = {path.name: path.stat().st_size for path in temporary.iterdir()}
        return {**self.store.files(self._name(final)), **here}

    def publish(self, temporary: Path, final: Path) -> None:
        folder = self._name(final)
        files = json.loads((temporary / MANIFEST).read_text(encoding="utf-8"))["files"]
        own = [path.name for path in sorted(temporary.iterdir()) if path.name != MANIFEST]
        self.store.send(temporary, folder, own)
        present = self.store.files(folder)
        lost = [name for name, record in files.items() if present.get(name) != record["size"]]
        if lost:
            raise CheckpointError(f"{len(lost)} files of {final} did not arrive whole: {', '.join(lost[:4])}")
        for name in sorted(set(present) - set(files) - {MANIFEST}):
            self.store.remove_file(folder, name)
        self.store.send(temporary, folder, [MANIFEST])
        self.store.abort_leftovers(folder)
        shutil.rmtree(temporary, ignore_errors=True)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        if not path.name.startswith("."):
            self.store.remove(self._name(path))

    def published(self, parent: Path) -> list[str]:
        names = [name.split("/") for name in self.store.files(self._name(parent))]
        return sorted(parts[0] for parts in names if len(parts) == 2 and parts[1] == MANIFEST)

    def discard(self, path: Path) -> None:
        self.store.remove(self._name(path))

    def recover(self, parent: Path) -> list[str]:
        done = []
        for leftover in sorted(parent.glob(f"{TEMPORARY}*")):
            shutil.rmtree(leftover, ignore_errors=True)
            done.append(f"{leftover} was unfinished: removed")
        below = self.store.files(self._name(parent))
        folders = {name.rpartition("/")[0] for name in below if _OURS.match(name.rpartition("/")[2])}
        for folder in sorted(folders):
            if f"{folder}/{MANIFEST}" not in below:
                place = f"{self._name(parent)}/{folder}".strip("/")
                self.store.remove(place)
                done.append(f"{self.store.shown(place)} was unfinished: removed")
        return done

    def _name(self, path: Path) -> str:
        """The folder below the prefix that a local path stands for."""
        name = path.relative_to(self.root).as_posix()
        return "" if name == "." else name
