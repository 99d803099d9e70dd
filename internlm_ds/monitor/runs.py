"""A run directory as values: its curves, its validation points, where it resumed, and its facts.

Read tolerantly, since a run may still be going on or have been cut off: a torn last line is left out, null is a gap,
and of two lines for one batch the later counts. Only metrics.jsonl is needed; train.log, resolved.json and config.py
add facts.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_ds.errors import DataFormatError
from internlm_ds.monitor.log import parse_line

METRICS_FILE = "metrics.jsonl"
_NEW_RUN = "===========New Run"
_SIZES = re.compile(r"data parallel size: (\d+), pipeline parallel size: (\d+), tensor parallel size: (\d+)")
_PARAMS = re.compile(r"parameters of the whole model: (\d+)")
_ELEMENTS = re.compile(r"Number of elements on ranks: \[([\d, ]+)\]")


@dataclass(frozen=True)
class Run:
    """What a run directory holds.

    Attributes:
        folder: The run directory.
        steps: One object of metrics.jsonl per batch, by rising `step`.
        validations: By name of the set, its objects by rising `step`.
        resumes: Batch indices at which a later launch took over, rising.
        resolved: Values of resolved.json by dotted key; empty without that file.
        job_name: `JOB_NAME`, else the folder's name.
        layout: Sizes of data, pipeline and tensor parallelism, if the log tells them.
        num_params: Parameters of the whole model, if the log tells them.
        num_stage_elements: Elements that the optimizers of one stage and tensor rank hold, if the log tells them.
        notes: What was odd about the files.
    """

    folder: Path
    steps: tuple[dict[str, Any], ...]
    validations: dict[str, list[dict[str, Any]]]
    resumes: tuple[int, ...]
    resolved: dict[str, Any]
    job_name: str
    layout: tuple[int, int, int] | None
    num_params: int | None
    num_stage_elements: int | None
    notes: tuple[str, ...]

    def column(self, key: str) -> list[float | None]:
        """The numbers of one field by step; None where it is null, missing or no number."""
        return [_number(step.get(key)) for step in self.steps]

    @property
    def failed(self) -> list[int]:
        """Batches whose update was skipped because of an infinite or NaN gradient."""
        return [step["step"] for step in self.steps if step.get("update_applied") is False]

    @property
    def absent(self) -> list[int]:
        """Batches between the first and the last that wrote no line (`data.skip_batches`)."""
        present = {step["step"] for step in self.steps}
        first, last = self.steps[0]["step"], self.steps[-1]["step"]
        # a file with absurd step numbers must not fill the memory
        return [] if last - first > 10_000_000 else [b for b in range(first, last) if b not in present]


def read_run(folder: str | Path) -> Run:
    """Read a run directory (or its metrics.jsonl).

    Raises:
        DataFormatError: The folder or its metrics.jsonl is missing, a line in it is no JSON object, or no step is
            there yet.
    """
    folder = Path(folder)
    if folder.name == METRICS_FILE and folder.is_file():
        folder = folder.parent
    lines, notes = _read_metrics(folder)
    log = _LogFacts.read(folder / "train.log")
    steps, validations, rewinds = _in_order(lines)
    if not steps:
        raise DataFormatError(
            "no step has been written yet; try again once training has made its first step",
            path=str(folder / METRICS_FILE),
        )
    first = {steps[0]["step"]} - {0}
    inside = {step for step in log.resumes if steps[0]["step"] < step <= steps[-1]["step"]}
    resolved = _read_resolved(folder / "resolved.json")
    return Run(
        folder=folder,
        steps=tuple(steps),
        validations=validations,
        resumes=tuple(sorted(first | set(rewinds) | inside)),
        resolved=resolved,
        job_name=str(resolved.get("JOB_NAME") or _job_name(folder / "config.py") or folder.resolve().name),
        layout=log.layout,
        num_params=log.num_params,
        num_stage_elements=log.num_stage_elements,
        notes=tuple(notes),
    )


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    path = folder / METRICS_FILE
    if not folder.is_dir():
        raise DataFormatError("there is no such run directory", path=str(folder))
    if not path.is_file():
        raise DataFormatError(
            f"holds no {METRICS_FILE}, so it is no run directory (launch/pretrain.py --run-dir names it)",
            path=str(folder),
        )
    found: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        parsed = _object(text)
        if parsed is not None:
            found.append(parsed)
        elif number == len(texts):
            return found, [f"the last line of {METRICS_FILE} is incomplete and was left out"]
        else:
            raise DataFormatError("not a JSON object of a training step", path=str(path), line=number)
    return found, []


def _object(text: str) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None if it is not an object with a whole `step`."""
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    if not isinstance(parsed, dict):
        return None
    step = parsed.get("step")
    return parsed if isinstance(step, int) and not isinstance(step, bool) else None


Lines = list[dict[str, Any]]


def _in_order(lines: Lines) -> tuple[Lines, dict[str, Lines], list[int]]:
    """Steps and validation points by rising step, and the steps at which the file went back.

    What an interrupted launch wrote beyond the checkpoint that the next one resumed from did not become part of the
    run.
    """
    steps: dict[int, dict[str, Any]] = {}
    sets: dict[str, dict[int, dict[str, Any]]] = {}
    rewinds: list[int] = []
    newest = -1
    for line in lines:
        step = line["step"]
        if "validation" in line:
            sets.setdefault(str(line["validation"]), {})[step] = line
            continue
        if step <= newest:
            rewinds.append(step)
            steps = {kept: value for kept, value in steps.items() if kept < step}
            sets = {name: {k: v for k, v in points.items() if k < step} for name, points in sets.items()}
        steps[step] = line
        newest = step
    ordered = {name: [points[k] for k in sorted(points)] for name, points in sets.items() if points}
    return [steps[k] for k in sorted(steps)], ordered, rewinds


@dataclass(frozen=True)
class _LogFacts:
    """What train.log tells beyond the metrics."""

    resumes: tuple[int, ...] = ()
    layout: tuple[int, int, int] | None = None
    num_params: int | None = None
    num_stage_elements: int | None = None

    @classmethod
    def read(cls, path: Path) -> _LogFacts:
        resumes: list[int] = []
        layout, num_params, elements, launches, waiting = None, None, None, 0, False
        for line in _lines(path):
            if _NEW_RUN in line:
                launches, waiting = launches + 1, True
            elif match := _SIZES.search(line):
                layout = (int(match[1]), int(match[2]), int(match[3]))
            elif match := _ELEMENTS.search(line):
                elements = sum(int(text) for text in match[1].split(","))
            elif match := _PARAMS.search(line):
                num_params = int(match[1])
            elif waiting and (step := parse_line(line)) is not None:
                waiting = False
                if launches > 1:
                    resumes.append(int(step.metrics["step"]))
        return cls(tuple(resumes), layout, num_params, elements)


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _read_resolved(path: Path) -> dict[str, Any]:
    """Values of resolved.json by key: a list of objects with `key` and `value`, or an object of them."""
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if isinstance(parsed, dict) and isinstance(parsed.get("leaves"), list):
        parsed = parsed["leaves"]
    if isinstance(parsed, list):
        return {str(leaf["key"]): leaf.get("value") for leaf in parsed if isinstance(leaf, dict) and "key" in leaf}
    if isinstance(parsed, dict):
        return {
            key: value["value"] if isinstance(value, dict) and "value" in value else value
            for key, value in parsed.items()
        }
    return {}


def _job_name(path: Path) -> str | None:
    """`JOB_NAME` of a configuration, read without executing it."""
    if not path.is_file():
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "JOB_NAME" for t in node.targets):
            return str(node.value.value) if isinstance(node.value, ast.Constant) else None
    return None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # json.loads reads NaN and Infinity, which files of others may hold
    return value if value == value and abs(value) != float("inf") else None
