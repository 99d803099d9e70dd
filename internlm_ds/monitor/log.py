"""Logging in InternLM's format: where lines go, what a step's line looks like, and how to read one back.

Every rank writes to stderr. The log rank also writes RUN_DIR/train.log; another rank's train.rank{n}.log appears with
the first line it has to say. What the numbers mean is `train.metrics`' and `throughput`'s business.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

LOGGER_NAME = "internlm_ds"
FORMAT = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s in %(funcName)s -- %(message)s"

# the tutorial's keys, in its order; everything else follows behind
LINE_KEYS = (
    "tflops",
    "step",
    "loss",
    "tgs (tokens/gpu/second)",
    "lr",
    "loss_scale",
    "grad_norm",
    "micro_num",
    "num_consumed_tokens",
    "inf_nan_skip_batches",
    "num_samples_in_batch",
    "largest_length",
    "largest_batch",
    "smallest_batch",
    "adam_beta2",
    "fwd_bwd_time",
)
# the short name in metrics.jsonl -> the name in the line
LONG_NAMES = {"tgs": "tgs (tokens/gpu/second)"}

LOG_LINE = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\t(?P<level>[A-Z]+) (?P<file>[^:\t]+):(?P<line>\d+)"
    r" in (?P<function>\S+) -- (?P<metrics>[^=,]+=[^=,]*(?:,[^=,]+=[^=,]*)*)"
)


@dataclass(frozen=True)
class LogLine:
    """A step's line, taken apart.

    Attributes:
        time: As written, e.g. `2023-07-07 12:28:57,802`.
        metrics: Numbers by the names of metrics.jsonl (`tgs`, not its long form); None for null, else text.
    """

    time: str
    level: str
    file: str
    line: int
    function: str
    metrics: dict[str, Any]


def setup(
    run_dir: str | Path | None, *, rank: int, is_log_rank: bool, level: int = logging.INFO, stream: TextIO | None = None
) -> logging.Logger:
    """Send the lines of this process to stderr and into the run directory; replaces an earlier set-up.

    Args:
        run_dir: Folder of the log files, created if need be; None for stderr only.
        rank: Global rank, which names the file of a rank that is not the log rank.
        stream: In the place of stderr.
    Returns:
        The logger `internlm_ds`; `logging.getLogger(__name__)` of our modules are its children.
    """
    logger = logging.getLogger(LOGGER_NAME)
    close()
    handlers: list[logging.Handler] = [logging.StreamHandler(stream or sys.stderr)]
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        name = "train.log" if is_log_rank else f"train.rank{rank}.log"
        handlers.append(logging.FileHandler(Path(run_dir) / name, encoding="utf-8", delay=not is_log_rank))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    logger.setLevel(level)
    # DeepSpeed and others put handlers on the root logger: without this each line would show twice
    logger.propagate = False
    return logger


def close() -> None:
    """Undo `setup`: close the files, hand lines back to the root logger."""
    logger = logging.getLogger(LOGGER_NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """One step as `key=value,key=value`: the tutorial's keys first and in its order, the others in theirs.

    Numbers are written as Python writes them, None as `null`, booleans as `true` and `false`; a mapping is spread over
    `key/name`. Commas and equals signs inside names and texts give way, so that every line can be taken apart again.

    >>> format_metrics({"lr": 4e-07, "tgs": 1424.64, "step": 0})
    'step=0,tgs (tokens/gpu/second)=1424.64,lr=4e-07'
    """
    flat = {LONG_NAMES.get(key, key): value for key, value in _spread(metrics).items()}
    ordered = [*(key for key in LINE_KEYS if key in flat), *(key for key in flat if key not in LINE_KEYS)]
    return ",".join(f"{_plain(key)}={_plain(_text(flat[key]))}" for key in ordered)


def parse_line(text: str) -> LogLine | None:
    """Take a step's line apart, the tutorial's or ours; None for any other line.

    >>> line = parse_line("2023-07-07 12:28:57,802\\tINFO train.py:323 in record -- tflops=63.2,step=0,loss=11.6")
    >>> line.metrics
    {'tflops': 63.2, 'step': 0, 'loss': 11.6}
    """
    match = LOG_LINE.fullmatch(text.rstrip("\r\n"))
    if match is None:
        return None
    short = {long: name for name, long in LONG_NAMES.items()}
    pairs = (pair.split("=", 1) for pair in match["metrics"].split(","))
    metrics = {short.get(key, key): _value(value) for key, value in pairs}
    if "step" not in metrics:
        return None
    return LogLine(match["time"], match["level"], match["file"], int(match["line"]), match["function"], metrics)


def _spread(metrics: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _plain(text: str) -> str:
    return text.replace(",", ";").replace("=", ":").replace("\n", " ")


def _value(text: str) -> Any:
    constants = {"null": None, "None": None, "true": True, "false": False, "nan": math.nan, "inf": math.inf}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
