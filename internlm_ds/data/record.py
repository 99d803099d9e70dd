"""`RUN_DIR/data.json`: what every launch of a run noted of its data, so that its batches can be told later.

One entry a launch: the settings that decide on packs and their order, the files with size and hash of their meta, the
number of data-parallel ranks, and the sampler's position at the start. A launch that resumes in the same run directory
adds an entry. What was in a batch is `trace`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from internlm_ds.config.render import json_value
from internlm_ds.config.schema import DataConfig
from internlm_ds.data.binformat import meta_path, write_whole
from internlm_ds.data.catalog import BinFile, Catalog
from internlm_ds.data.packing import Concatenation
from internlm_ds.data.trace import Trace
from internlm_ds.data.trainset import open_sampler, open_train_set
from internlm_ds.errors import DataFormatError

NAME = "data.json"
FORMAT = 1


@dataclass(frozen=True)
class UsedFile:
    """A file as a launch found it.

    Attributes:
        file: Its place in the data set.
        size: Bytes of the bin.
        meta_sha256: Hex digest of the meta.
        packs: Packs it was cut into.
    """

    file: BinFile
    size: int
    meta_sha256: str
    packs: int

    @property
    def change(self) -> str:
        """How the file differs now; empty if it does not."""
        path = self.file.path
        if not os.path.isfile(path):
            return "is gone"
        if (size := os.path.getsize(path)) != self.size:
            return f"has {size} bytes, it had {self.size}"
        if not meta_path(path).is_file():
            return "has lost its meta"
        return "" if _digest(meta_path(path)) == self.meta_sha256 else "has another meta"


@dataclass(frozen=True)
class Launch:
    """One launch of a run.

    Attributes:
        data: Settings of the data; `train_folder` is absolute.
        weights: `internlm_ds.data_weights`.
        vocab_size: `model.vocab_size`.
        dataset_types: Names of the data types, in the order of their ids.
        data_size: Data-parallel ranks.
        position: The sampler's state at the start.
        files: What it read; empty for synthetic data.
        time: When it began, Unix seconds by the clock of metrics.jsonl.
    """

    data: DataConfig
    weights: Mapping[str, float] | None
    vocab_size: int
    dataset_types: tuple[str, ...]
    data_size: int
    position: Mapping[str, Any]
    files: tuple[UsedFile, ...]
    time: float

    @property
    def first_batch(self) -> int:
        """Index of the first batch it trained."""
        return int(self.position["batch_count"])

    def changes(self) -> dict[str, str]:
        """Files that are not what they were, by path, each with how it differs."""
        return {used.file.path: how for used in self.files if (how := used.change)}

    def trace(self) -> Trace:
        """Its batches, from the files as they are now.

        Raises:
            DataFormatError: The files are cut into other packs than they were, so that the order is lost.
        """
        changes = self.changes()
        gone = [path for path in changes if not os.path.isfile(path) or not meta_path(path).is_file()]
        files = Catalog(self.data.train_folder or "", self.dataset_types, tuple(used.file for used in self.files))
        if gone:
            raise _lost(changes)
        data = open_train_set(self.data, vocab_size=self.vocab_size, log=False, files=files if self.files else None)
        was = {used.file.path: used.packs for used in self.files if used.packs}
        now = {file.path: len(part) for file, part in zip(data.files, data.packs.parts) if len(part)}
        if was != now:
            raise _lost(changes)
        ranks = {"data_rank": 0, "data_size": self.data_size}
        sampler = open_sampler(self.data, data.packs, data.files, weights=self.weights, **ranks)
        sampler.load_state_dict(self.position)
        return Trace(data, sampler, skip_batches=self.data.skip_batches)


def note_launch(
    run_dir: str | os.PathLike[str],
    *,
    data: DataConfig,
    weights: Mapping[str, float] | None = None,
    vocab_size: int,
    dataset_types: Sequence[str],
    data_size: int,
    position: Mapping[str, Any],
    packs: Concatenation,
    files: Sequence[BinFile],
    time: float = 0.0,
) -> None:
    """Add this launch to the run directory's data.json.

    Args:
        files: The file of each part of `packs`.
        time: Now.
    Raises:
        DataFormatError: A file cannot be read, or the note not be written.
    """
    target = Path(run_dir) / NAME
    folder = data.train_folder and os.path.abspath(data.train_folder)
    settings = json_value({**asdict(data), "train_folder": folder})
    try:
        launch = {
            "data": settings,
            "data_weights": None if weights is None else dict(weights),
            "vocab_size": vocab_size,
            "dataset_types": list(dataset_types),
            "data_size": data_size,
            "position": dict(position),
            "time": time,
            "files": [_as_json(file, packs=len(part)) for file, part in zip(files, packs.parts)],
        }
        # a file that cannot be read is no reason not to train: the note begins anew
        launches = [*_launches(target, strict=False), launch]
        write_whole(target, (json.dumps({"format": FORMAT, "launches": launches}, indent=1) + "\n").encode())
    except OSError as error:
        raise DataFormatError(f"the data of this run cannot be noted: {error}", path=str(target)) from error


def read_launches(run_dir: str | os.PathLike[str]) -> list[Launch]:
    """The launches of a run, the oldest first.

    Raises:
        DataFormatError: The folder is no run directory, or the note is damaged.
    """
    target = Path(run_dir) / NAME
    if not Path(run_dir).is_dir():
        raise DataFormatError("there is no such run directory", path=str(run_dir))
    if not target.is_file():
        message = f"holds no {NAME}, in which a run notes its data: no run directory, or one of an older version"
        raise DataFormatError(message, path=str(run_dir))
    try:
        return [_launch(entry) for entry in _launches(target, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataFormatError(f"damaged, or written by another version ({error!r})", path=str(target)) from None


def launch_of(launches: Sequence[Launch], index: int, *, trained_at: float | None = None) -> Launch:
    """The launch that trained a batch last: of several that may have, the later one counts.

    Args:
        trained_at: When metrics.jsonl says that it was trained; a launch that began later did not get so far.
    Raises:
        DataFormatError: All of them began behind it.
    """
    for launch in reversed(launches):
        if launch.first_batch <= index and (trained_at is None or launch.time <= trained_at):
            return launch
    first = min(launch.first_batch for launch in launches)
    message = f"there is no batch {index} in this run directory: it begins with batch {first}"
    raise DataFormatError(f"{message}; look at the run that was resumed")


def _launches(target: Path, *, strict: bool) -> list[dict[str, Any]]:
    if not target.is_file():
        return []
    try:
        found = json.loads(target.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        return list(found["launches"])
    except (KeyError, TypeError, ValueError):
        if strict:
            raise
        return []


def _launch(entry: Mapping[str, Any]) -> Launch:
    known = {one.name for one in fields(DataConfig)}
    return Launch(
        data=DataConfig(**{key: value for key, value in entry["data"].items() if key in known}),
        weights=entry["data_weights"],
        vocab_size=int(entry["vocab_size"]),
        dataset_types=tuple(entry["dataset_types"]),
        data_size=int(entry["data_size"]),
        position=entry["position"],
        files=tuple(_used(one) for one in entry["files"]),
        time=float(entry["time"]),
    )


def _used(entry: Mapping[str, Any]) -> UsedFile:
    of_file = {one.name: entry[one.name] for one in fields(BinFile)}
    return UsedFile(BinFile(**of_file), int(entry["size"]), str(entry["meta_sha256"]), int(entry["packs"]))


def _as_json(file: BinFile, *, packs: int) -> dict[str, Any]:
    path = os.path.abspath(file.path)
    size, digest = os.path.getsize(path), _digest(meta_path(path))
    return {**asdict(file), "path": path, "size": size, "meta_sha256": digest, "packs": packs}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lost(changes: Mapping[str, str]) -> DataFormatError:
    listed = "".join(f"\n  {path} {how}" for path, how in changes.items())
    message = "the data has changed since this run, and with it which documents stand in which batch:"
    return DataFormatError(f"{message}{listed}\nput the old files back")
