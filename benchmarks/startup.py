#!/usr/bin/env python
"""How long a user waits: the command line beside bare imports, a job's first step beside bare DeepSpeed, A B A B ….

`python benchmarks/startup.py` measures

* `commands`: `internlm-ds --help` and `--version` beside `python -c 'import argparse'`; `convert-config` and `plan` of
  the shipped 7B configuration beside `python -c 'import numpy'`;
* `job`: `deepspeed --num_accelerators 2 launch/pretrain.py` with the shipped debug configuration, from the start of
  the launcher to the first step's line, beside `first_step_peer.py`, a script of the same size that knows DeepSpeed's
  `PipelineModule` and nothing of ours, started the same way.

Ours runs from a copy of the package with its bytecode beside it, as after an installation; the peers' packages are
installed anyway. DeepSpeed compiles a shared-memory operator for the CPU at its first start, over a minute, which
neither a pipeline nor we need: the peer leaves it out by the same line as we do, else the comparison would be unfair.
Ratios of the clock and, less noisy, of seconds of processor: of a command until its end, of a job those of all its
processes until the first step. `--quick` takes one round of jobs and three of
commands.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pairs

ROOT = Path(__file__).resolve().parents[1]
PEER = Path(__file__).resolve().with_name("first_step_peer.py")
PARTS = ("commands", "job")
ARGPARSE, NUMPY = "python -c 'import argparse'", "python -c 'import numpy'"
JOB, BARE = "pretrain.py", "bare PipelineModule"
# what a user waits for -> (what it is measured beside, the most it may take of it)
GOALS = {
    "internlm-ds --help": (ARGPARSE, 3.0),
    "internlm-ds --version": (ARGPARSE, 3.0),
    "internlm-ds convert-config": (NUMPY, 1.5),
    "internlm-ds plan": (NUMPY, 1.5),
    JOB: (BARE, 1.15),
}
COMMANDS, JOBS = (ARGPARSE, NUMPY, *list(GOALS)[:4]), (BARE, JOB)
JOB_LIMIT_S = 300


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    rounds = 1 if args.quick else args.rounds
    report = pairs.facts(args, packages=["numpy", *(["torch", "deepspeed"] if "job" in args.parts else [])])
    with tempfile.TemporaryDirectory() as folder:
        place = install(Path(folder))
        figures: dict[str, list[pairs.Finished]] = {}
        if "commands" in args.parts:
            figures |= in_turn(place, COMMANDS, rounds=2 * rounds + 1)
        if "job" in args.parts:
            figures |= in_turn(place, JOBS, rounds=rounds)
    report |= {"figures": figures, "ratios": ratios(figures)}
    _show(report)
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="of A B of the job; twice as many and one of commands (default 5)")
    add("--parts", type=_parts, default=PARTS, metavar="A,B", help=f"some of {','.join(PARTS)} (default all)")
    add("--quick", action="store_true", help="one round of the job, to see that it works")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    if unknown := set(text.split(",")) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return tuple(text.split(","))


def install(folder: Path) -> Path:
    """A copy of what a user has after an installation, bytecode included."""
    for name in ("internlm_ds", "launch", "model_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(folder / "internlm_ds", quiet=2)
    # as pip writes it; `python -m` would look into the current folder first
    lines = ["import sys", "from internlm_ds.cli.main import main", "sys.exit(main())"]
    (folder / "internlm-ds").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def in_turn(place: Path, names: Sequence[str], *, rounds: int) -> dict[str, list[pairs.Finished]]:
    """A B A B …, the first round, which fills the file system's caches, not counted if there are several."""
    warm_up = rounds > 1
    figures = pairs.in_turn({name: partial(measure, place, name) for name in names}, rounds=rounds + warm_up)
    return {name: found[warm_up:] for name, found in figures.items()}


def measure(place: Path, name: str) -> pairs.Finished:
    """One start of one contestant."""
    environ = {"PYTHONPATH": str(place), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if name in JOBS:
        return _first_step(place, name, environ)
    return pairs.process(_command(place, name), environ=environ)


def _command(place: Path, name: str) -> list[str]:
    if name.startswith("python "):
        return [sys.executable, *name.split(" ", 2)[1:2], name.split("'")[1]]
    options = name.split()[1:]
    if not options[0].startswith("-"):
        options.append(str(place / "model_configs" / "7b.py"))
    return [sys.executable, str(place / "internlm-ds"), *options]


# ---- a job -----------------------------------------------------------------------------------------------------------


def _first_step(place: Path, name: str, environ: dict[str, str]) -> pairs.Finished:
    """From the start of the launcher until rank 0 says that its first step is done."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    launcher += ["--master_port", str(_free_port())]
    if name == BARE:
        command, said = [*launcher, str(PEER)], "first step: loss"
    else:
        config = ["--config", str(place / "model_configs" / "debug_cpu.py"), "--set", "data.total_steps=1"]
        run = ["--run-dir", tempfile.mkdtemp(dir=place), "--backend", "gloo"]
        command, said = [*launcher, str(place / "launch" / "pretrain.py"), *config, *run], "step=0"
    # without DS_ACCELERATOR deepspeed's own processes look for a device, and warn
    environ = {**os.environ, "DS_ACCELERATOR": "cpu", **environ}
    started = time.perf_counter()
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ, cwd=place, text=True, errors="replace"
    )
    assert job.stdout is not None
    lines, finished = [], None
    for line in job.stdout:
        lines.append(line)
        if finished is None and said in line:
            finished = pairs.Finished(time.perf_counter() - started, 0.0, _cpu_seconds(job.pid))
    job.stdout.close()
    if job.wait(timeout=JOB_LIMIT_S) or finished is None:
        raise RuntimeError(f"{name}: no line with {said!r}, exit code {job.returncode}:\n{''.join(lines[-40:])}")
    return finished


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class _Process:
    """Of `/proc/PID/stat`; seconds include those of children that have ended."""

    parent: int
    seconds: float


def _cpu_seconds(root: int) -> float:
    """Seconds of processor of a process and all below it; 0 without /proc. Fields 4, 14-17 of proc(5)."""
    processes: dict[int, _Process] = {}
    ticks = os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        processes[int(path.parent.name)] = _Process(int(fields[1]), sum(map(int, fields[11:15])) / ticks)
    return sum(each.seconds for pid, each in processes.items() if _is_below(pid, root, processes))


def _is_below(pid: int, root: int, processes: dict[int, _Process]) -> bool:
    while pid != root and pid in processes:
        pid = processes[pid].parent
    return pid == root


# ---- what is shown ---------------------------------------------------------------------------------------------------


def ratios(figures: dict[str, list[pairs.Finished]]) -> dict[str, dict[str, Any]]:
    """Of each that has a goal: the ratio of the clock, of seconds of processor, and the goal."""
    found: dict[str, dict[str, Any]] = {}
    for name, (peer, goal) in GOALS.items():
        if name in figures:
            ours, theirs = figures[name], figures[peer]
            clock = pairs.ratio([each.seconds for each in ours], [each.seconds for each in theirs])
            found[name] = {"of": peer, "goal": goal, "clock": clock, "cpu": None}
            if all(each.cpu_seconds for each in theirs):
                found[name]["cpu"] = pairs.ratio(
                    [each.cpu_seconds for each in ours], [each.cpu_seconds for each in theirs]
                )
    return found


def _show(report: dict[str, Any]) -> None:
    import statistics

    print(pairs.headline(report) + "\n")
    rows = []
    for name, runs in report["figures"].items():
        clock, cpu = (statistics.median(getattr(run, key) for run in runs) for key in ("seconds", "cpu_seconds"))
        found = report["ratios"].get(name)
        said = [str(found["clock"]), str(found["cpu"] or "-"), f"<= {found['goal']:g}"] if found else ["", "", ""]
        rows.append([name, clock, cpu, *said])
    print(
        pairs.table(["until its end; of a job until its first step", "s", "CPU s", "ratio", "of CPU s", "goal"], rows)
    )


if __name__ == "__main__":
    sys.exit(main())
