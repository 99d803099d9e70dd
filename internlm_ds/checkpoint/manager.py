"""Saving during a run: when, where to, once per step, and alone.

The manager of a run holds the lock of its save folder, reads the stop file, remembers which step is saved already and
which snapshot slot is next. The rule itself is `policy`'s, what is written is the format's and the engine's. What a
run starts from is `start`'s; its names are given on here, so that a caller meets one door.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from internlm_ds.checkpoint import address as addresses
from internlm_ds.checkpoint.agree import Comm, Solo, on_first_rank
from internlm_ds.checkpoint.lock import FolderLock
from internlm_ds.checkpoint.place import INDEX, LocalPlace, Place, StorePlace
from internlm_ds.checkpoint.policy import Decision, SavePolicy, decide
from internlm_ds.checkpoint.search import detect, find_checkpoints
from internlm_ds.checkpoint.start import PARTS, Start, content_parts, plan_start
from internlm_ds.checkpoint.storage import base
from internlm_ds.checkpoint.storage.s3_folder import S3Storage
from internlm_ds.checkpoint.store_lock import StoreLock
from internlm_ds.config.schema import CkptConfig

__all__ = [
    "PARTS",
    "CheckpointManager",
    "SaveTask",
    "Start",
    "content_parts",
    "detect",
    "find_checkpoints",
    "plan_start",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveTask:
    """What is due now.

    Attributes:
        folder: Where to save a checkpoint, None if none is due.
        stop: The run ends on purpose after this step.
    """

    folder: Path | None = None
    stop: bool = False


class CheckpointManager:
    """Tells a run after each step what to save. All ranks make one and call its methods together.

    Args:
        total_steps: `data.total_steps`.
        last_saved: Step count of the checkpoint that the run resumed from, None for a new run.
    Raises:
        CheckpointError: On all ranks, if another live run writes the save folder or its storage cannot be used.
    """

    def __init__(self, ckpt: CkptConfig, *, total_steps: int, comm: Comm | None = None, last_saved: int | None = None):
        self._comm = comm or Solo()
        self._enabled = ckpt.enable_save_ckpt and ckpt.save_ckpt_folder is not None
        self._policy = SavePolicy(ckpt.checkpoint_every, ckpt.oss_snapshot_freq, total_steps)
        self._stop_file = Path(ckpt.stop_file_path) if ckpt.stop_file_path else None
        self._last_saved = last_saved
        self._locks: list[FolderLock | StoreLock] = []
        self._storages: dict[Path, base.Storage] = {}
        self._folder = self._snapshots = Path()
        self._slot = 0
        if self._enabled:
            self._folder = self._open_storage(ckpt.save_ckpt_folder, ckpt)
            self._snapshots = (
                self._open_storage(ckpt.snapshot_ckpt_folder, ckpt)
                if ckpt.snapshot_ckpt_folder
                else self._folder / "snapshot"
            )
        self._slot = on_first_rank(self._comm, self._open, doing="preparing to save checkpoints")

    def after_step(self, step_count: int) -> SaveTask:
        """What is due after a step with `step_count` successful updates so far; nothing twice for the same count.

        Call `saved` once the checkpoint is written.
        """
        due = decide(step_count, self._policy, stop_signal=self._stop_signal())
        if due.kind is None or not self._enabled or step_count == self._last_saved:
            return SaveTask(stop=due.stop)
        return SaveTask(self._place(due, step_count), stop=due.stop)

    def at_end(self, step_count: int) -> SaveTask:
        """The final checkpoint: due whenever saving is enabled and the last step is not saved yet."""
        if not self._enabled or step_count == self._last_saved:
            return SaveTask()
        return SaveTask(self._folder / str(step_count))

    def saved(self, task: SaveTask, step_count: int) -> None:
        """Take note that `task.folder` was published."""
        assert task.folder is not None, "nothing was due"
        if task.folder.parent == self._snapshots:
            self._slot = 1 - self._slot
        self._last_saved = step_count

    def close(self) -> None:
        """Give the save folder free."""
        for lock in self._locks:
            lock.release()
        self._locks = []

    def storage(self, folder: Path) -> base.Storage:
        """Where a folder of `SaveTask` is written to."""
        return next(held for root, held in self._storages.items() if folder.is_relative_to(root))

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _place(self, due: Decision, step_count: int) -> Path:
        return self._folder / str(step_count) if due.kind == "normal" else self._snapshots / str(self._slot)

    def _open(self) -> int:
        """Rank 0's part: lock, stop file, leftovers of a killed run; returns the next snapshot slot."""
        if self._stop_file is not None and not self._stop_file.exists():
            self._stop_file.parent.mkdir(parents=True, exist_ok=True)
            self._stop_file.write_text("0", encoding="utf-8")
        if not self._enabled:
            return 0
        self._locks = [FolderLock(self._folder)]
        held = self.storage(self._folder)
        if isinstance(held, S3Storage):
            self._locks.append(StoreLock(held.store))
        for folder in {self._folder, self._snapshots}:
            for done in self.storage(folder).recover(folder):
                log.warning("%s", done)
        return self._next_slot()

    def _open_storage(self, text: str, ckpt: CkptConfig) -> Path:
        """The local folder of an address, its storage noted."""
        address, staging = addresses.parse(text), ckpt.async_upload_tmp_folder
        folder = base.local_counterpart(address, staging=staging)
        self._storages[folder] = base.of(address, staging=staging)
        return folder

    def _next_slot(self) -> int:
        """0 for the first snapshot; later the slot that does not hold the newest one."""
        storage = self.storage(self._snapshots)
        if isinstance(storage, S3Storage):
            place: Place = StorePlace(storage.store, storage.root)
            root = storage.root / INDEX / self._snapshots.relative_to(storage.root)
        else:
            place, root = LocalPlace(self._snapshots), self._snapshots
        held = [c for c in place.candidates() if c.path.parent == root and c.path.name in ("0", "1")]
        return 1 - int(held[0].path.name) if held else 0

    def _stop_signal(self) -> int:
        if self._stop_file is None:
            return 0
        return self._comm.broadcast(_read_stop_file(self._stop_file) if self._comm.rank == 0 else 0)


def _read_stop_file(path: Path) -> int:
    try:
        return int(path.read_text(encoding="utf-8").strip() or 0)
    except (OSError, ValueError) as error:
        log.warning("stop file %s cannot be read as a whole number (%s): ignored", path, error)
        return 0
