"""What lies in a folder: which format a checkpoint has, and which checkpoints a save folder holds.

Only names and manifests are looked at; whether a checkpoint is whole is asked of its format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint.names import META_FILE, MODEL_FILE, OTHER_SPLIT, STEP_FILE
from internlm_ds.errors import CheckpointError

Format = Literal["native", "internlm", "llama", "hf"]
_HF_WEIGHTS = re.compile(r"(model.*\.safetensors|pytorch_model.*\.bin)$")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint in a save folder.

    Attributes:
        step: Successful updates; for a native one with a damaged manifest the number that its folder is named, else -1.
        damage: What is wrong with its manifest, "" if nothing is known to be.
    """

    path: Path
    step: int
    kind: Format
    is_snapshot: bool
    damage: str = ""


def detect(folder: str | Path) -> Format | None:
    """The format of a checkpoint folder, None if it is none."""
    folder = Path(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if manifests.NAME in names:
        return "native"
    if any(MODEL_FILE.fullmatch(name) or OTHER_SPLIT.fullmatch(name) for name in names):
        return "internlm"
    if any(META_FILE.fullmatch(name) for name in names):
        return "llama"
    if "config.json" in names and any(_HF_WEIGHTS.fullmatch(name) for name in names):
        return "hf"
    return None


def find_checkpoints(folder: Path) -> list[Candidate]:
    """All checkpoints below a save folder, the newest first; at equal steps normal ones before snapshots.

    A native checkpoint is a folder with a manifest, one of InternLM's a folder with a file `N.step`, its last one.
    """
    found = [candidate for path, names in _walk(folder) if (candidate := _candidate(path, names, root=folder))]
    return sorted(found, key=lambda c: (-c.step, c.is_snapshot, str(c.path)))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders with their files; links are followed, but no folder is seen twice; hidden ones are unfinished."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(path), files


def _candidate(path: Path, names: list[str], *, root: Path) -> Candidate | None:
    is_snapshot = "snapshot" in path.relative_to(root).parts[:-1]
    if manifests.NAME in names:
        try:
            return Candidate(path, manifests.read(path).step, "native", is_snapshot)
        except CheckpointError as error:
            number = int(path.name) if path.name.isdigit() and not is_snapshot else -1
            return Candidate(path, number, "native", is_snapshot, damage=str(error))
    steps = [int(match[1]) for name in names if (match := STEP_FILE.fullmatch(name))]
    return Candidate(path, max(steps), "internlm", is_snapshot) if steps else None
