"""Where a step's metrics go besides the log: metrics.jsonl, and tensorboard where it is installed."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from internlm_ds.errors import MissingExtraError

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: one strict JSON object per line, on disk as soon as it is written.

    Opening appends. A last line that a crash tore is cut off first, so that every line of the file can be read.

    Args:
        path: The file; its folder is created if need be.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinity become null, one-element tensors and arrays their number."""
        self._file.write(json.dumps(strict(metrics), allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorboardSink:
    """Metrics as tensorboard scalars, each under its own name, at the count of successful updates.

    Args:
        folder: Where the event file goes.
        queue_length: Steps that are held back and written together (`tensorboard.queue_max_length`).
        purge_step: First step that an earlier, interrupted run may have written and that is to be forgotten.
        writer: In the place of torch's `SummaryWriter`.
    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, *, queue_length: int = 1, purge_step: int | None = None, writer: Any = None):
        self.folder = Path(folder)
        self._writer = writer if writer is not None else _summary_writer(self.folder, purge_step)
        self._queue_length = max(1, queue_length)
        self._queue: list[tuple[dict[str, Any], int]] = []

    def write(self, metrics: Mapping[str, Any], *, step_count: int) -> None:
        """Add the numbers of one step; what is None or text is left out."""
        self._queue.append((dict(metrics), step_count))
        if len(self._queue) >= self._queue_length:
            self.flush()

    def write_texts(self, texts: Mapping[str, str]) -> None:
        """Add facts of the run (`job_name`, `config`, …) at step 0."""
        for tag, text in texts.items():
            self._writer.add_text(tag, text, 0)

    def flush(self) -> None:
        """Hand over what is held back."""
        for metrics, step_count in self._queue:
            for tag, value in metrics.items():
                self._add(tag, value, step_count)
        self._queue.clear()

    def close(self) -> None:
        self.flush()
        self._writer.close()

    def _add(self, tag: str, value: Any, step_count: int) -> None:
        if isinstance(value, Mapping):
            numbers = {name: float(inner) for name, inner in value.items() if _is_number(_plain(inner))}
            if numbers:
                self._writer.add_scalars(tag, numbers, step_count)
            return
        plain = _plain(value)
        if _is_number(plain):
            self._writer.add_scalar(tag, float(plain), step_count)


def open_tensorboard(
    folder: str | Path, *, queue_length: int = 1, purge_step: int | None = None
) -> TensorboardSink | None:
    """A `TensorboardSink`, or None and one line in the log where tensorboard is not installed.

    `enable_tb` is on by default, so its absence must not end a run.
    """
    try:
        return TensorboardSink(folder, queue_length=queue_length, purge_step=purge_step)
    except MissingExtraError as error:
        logger.warning("tensorboard is off: %s (or set enable_tb = False)", error)
        return None


def strict(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinity are None, numpy and torch numbers plain ones, paths text."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    plain = _plain(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        return None
    if plain is None or isinstance(plain, bool | int | float | str):
        return plain
    return str(plain)


def _plain(value: Any) -> Any:
    """A one-element tensor or array as its number; anything else unchanged."""
    if not isinstance(value, str | bool | int | float) and hasattr(value, "item"):
        return value.item()
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _mend_last_line(path: Path) -> None:
    """Complete a last line that only lacks its end; cut off one that was torn in the middle."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        whole = file.read()
        start = whole.rfind(b"\n") + 1
        try:
            json.loads(whole[start:])
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


def _summary_writer(folder: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", extra="tensorboard", needed_for="writing tensorboard files") from error
    return SummaryWriter(str(folder), max_queue=5, flush_secs=3, purge_step=purge_step)
