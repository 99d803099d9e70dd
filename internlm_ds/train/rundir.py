"""The run directory: its place, the four files that say what was asked of this run, and the note of its data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from internlm_ds.config.render import as_json, json_value
from internlm_ds.data import record
from internlm_ds.data.loader import TrainLoader
from internlm_ds.errors import ConfigError
from internlm_ds.parallel.comm import ProcessComm
from internlm_ds.runspec import RunSpec
from internlm_ds.train.together import together
from internlm_ds.translate import Translation


def launch_time(comm: ProcessComm) -> str:
    """Rank 0's clock, `11-24-03.39.44`, the same on every rank."""
    return comm.broadcast(time.strftime("%m-%d-%H.%M.%S"))


def place(run_dir: str | None, *, job_name: str, launched: str) -> Path:
    """`--run-dir`, or `RUN/{JOB_NAME}/{launch time}` below the current folder."""
    return Path(run_dir) if run_dir else Path("RUN") / job_name / launched


def create(folder: Path, *, spec: RunSpec, translation: Translation, comm: ProcessComm) -> None:
    """Make the folder and write config.py, resolved.json, ds_config.json and translation.json; all ranks call it.

    Raises:
        ConfigError: On all ranks, if rank 0 cannot write there.
    """
    together(comm, lambda: _write(folder, spec=spec, translation=translation) if comm.rank == 0 else None)


def note_data(folder: Path, loader: TrainLoader, *, spec: RunSpec, comm: ProcessComm, is_log_rank: bool) -> None:
    """Note in data.json what is read from here on, and from where; all ranks call it once the loader stands there.

    Args:
        is_log_rank: This rank writes metrics.jsonl, and so this note: the two are compared by one clock.
    Raises:
        DataFormatError: On all ranks, if the log rank cannot write there.
    """

    def note() -> None:
        record.note_launch(
            folder,
            data=spec.config.data,
            weights=spec.config.internlm_ds.data_weights,
            vocab_size=spec.config.model.vocab_size,
            dataset_types=loader.dataset_types,
            data_size=spec.layout.data,
            position=loader.state_dict(),
            packs=loader.dataset.packs,
            files=loader.dataset.files,
            time=time.time(),
        )

    together(comm, lambda: note() if is_log_rank else None)


def _write(folder: Path, *, spec: RunSpec, translation: Translation) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.py").write_text(spec.text, encoding="utf-8")
        _write_json(folder / "resolved.json", [as_json(leaf, path=spec.path) for leaf in spec.leaves])
        _write_json(folder / "ds_config.json", translation.ds_config)
        _write_json(folder / "translation.json", [note.as_json() for note in translation.notes])
    except OSError as error:
        raise ConfigError(
            f"run directory {folder} cannot be written: {error}; name another one with --run-dir"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(json_value(value), indent=2, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
