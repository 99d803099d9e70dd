"""What the benchmarks share: contestants in turn, ratios of one round, facts of the machine, a table, a JSON file.

On a shared machine seconds move by a third and more from minute to minute; two things measured in the same round move
together. So every figure that is quoted is the median over rounds of a ratio within a round, with its smallest and
largest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

Measure = Callable[[], float]
Figure = TypeVar("Figure")


@dataclass(frozen=True)
class Ratio:
    """How many times `over` of the same round: median of the rounds, smallest, largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Finished:
    """A process that has ended: seconds from its start to its end, its largest resident memory, seconds of processor.

    The last is what a busy machine moves least.
    """

    seconds: float
    peak_mb: float
    cpu_seconds: float


def in_turn(contestants: Mapping[str, Callable[[], Figure]], *, rounds: int) -> dict[str, list[Figure]]:
    """What each contestant returns, round by round: A B C A B C …, every other round backwards.

    A contestant measures itself and returns its figure (seconds, a rate, several at once), so that its preparations do
    not count.
    """
    figures: dict[str, list[Figure]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            figures[name].append(contestants[name]())
    return figures


def ratio(figures: Sequence[float], over: Sequence[float]) -> Ratio:
    """`figures / over`, round by round.

    >>> str(ratio([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]))
    '3.00 (2.00-4.00)'
    """
    pairs = [a / b for a, b in zip(figures, over, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))


def beside(figures: Mapping[str, Sequence[float]], peer: str) -> dict[str, tuple[float, Ratio]]:
    """The median of each contestant's figures, and their ratio to the peer's."""
    return {name: (statistics.median(own), ratio(own, figures[peer])) for name, own in figures.items()}


def seconds(work: Callable[[], object]) -> float:
    """How long `work()` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def process(command: Sequence[str], *, environ: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end, output thrown away.

    Raises:
        subprocess.CalledProcessError: It failed; its error output is in the exception.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        list(command), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **(environ or {})}
    )
    assert child.stderr is not None
    errors = child.stderr.read()
    child.stderr.close()
    _, status, usage = os.wait4(child.pid, 0)
    taken = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, stderr=errors.decode(errors="replace"))
    kilo = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return Finished(taken, usage.ru_maxrss * kilo / 1e6, usage.ru_utime + usage.ru_stime)


def facts(args: argparse.Namespace, *, packages: Sequence[str]) -> dict[str, Any]:
    """Date, machine, versions and settings, for the head of a report."""
    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout, or an optional package
        return "absent"


def headline(report: Mapping[str, Any]) -> str:
    """The facts on one line."""
    versions = ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    return f"{report['date']}, {report['machine']}, {versions}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right; floats with three digits.

    >>> print(table(["case", "MB/s"], [["one", 5.06], ["three", 35.3]]))
    case   MB/s
    one    5.06
    three  35.3
    """
    lines = [list(head), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(line, widths)) for line in lines)
    )


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:.0f}"
    return str(cell)


def write_json(report: Mapping[str, Any], path: str | None) -> None:
    """Write the report where `--json` says, if it says so."""
    if path:
        text = json.dumps(report, indent=1, default=vars)
        Path(path).write_text(text + "\n", encoding="utf-8")
