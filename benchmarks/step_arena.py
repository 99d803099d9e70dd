"""The contestants of `step.py` as processes that take turns."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pairs import Ratio, in_turn, ratio
from step_facts import Facts

CONTESTANT = Path(__file__).with_name("step_contestant.py")


class Contestant:
    """The processes of one contestant: they are started, and wait until they are told to take steps."""

    def __init__(self, facts: Facts, *, threads: int):
        self._folder = tempfile.TemporaryDirectory()
        self.errors = Path(self._folder.name, "errors")
        self.facts = replace(facts, store=str(Path(self._folder.name, "store")))
        size = self.facts.world_size
        self.processes = []
        for rank in range(size):
            environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            environ |= {"OMP_NUM_THREADS": max(1, threads // size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
            if facts.device == "cpu":
                environ |= {"DS_ACCELERATOR": "cpu"}
            with self.errors.open("a") as errors:
                process = subprocess.Popen(
                    [sys.executable, str(CONTESTANT), self.facts.dumps()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, **{key: str(value) for key, value in environ.items()}},
                )
            self.processes.append(process)
        self._ready = False

    def prepare(self, *, warm_up: int) -> None:
        """Wait until it runs, and its buffers, caches and states are made."""
        if not self._ready:
            for process in self.processes:
                self._line(process)
            self.steps(warm_up)
            self._ready = True

    def steps(self, count: int) -> list[dict[str, Any]]:
        """What every rank says of so many steps."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return [json.loads(self._line(process)) for process in self.processes]

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ContestantFailed(self.errors.read_text(errors="replace")[-1500:])
        return line

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self._folder.cleanup()


class ContestantFailed(RuntimeError):
    """A process ended before it answered; holds the end of its error output."""


@dataclass
class Figures:
    """What a contestant showed in all its turns."""

    seconds: list[float]
    peaks: list[list[float]]
    loss: float = 0.0

    def turn(self, contestant: Contestant, steps: int) -> float:
        """Take steps; the median of their seconds."""
        answers = contestant.steps(steps)
        self.seconds.append(statistics.median(answers[0]["seconds"]))
        self.peaks.append([answer["peak_mb"] for answer in answers])
        self.loss = answers[-1]["loss"]
        return self.seconds[-1]


class Arena:
    """Lets two contestants take turns.

    On the CPU contestants stay until they are stopped. Two models do not fit one GPU side by side: there every turn
    starts anew.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self._running: dict[Facts, Contestant] = {}

    def start(self, facts: Facts) -> Contestant:
        """The contestant, not waited for."""
        if facts not in self._running:
            self._running[facts] = Contestant(facts, threads=self.args.threads)
        return self._running[facts]

    def stop(self, facts: Facts) -> None:
        """If it runs."""
        if facts in self._running:
            self._running.pop(facts).close()

    def close(self) -> None:
        for running in list(self._running):
            self.stop(running)

    def compare(self, it: Facts, base: Facts) -> tuple[Ratio, Figures, Figures]:
        """Speed of `it` as a multiple of `base`'s, and the figures of both."""
        figures = {facts: Figures([], []) for facts in (base, it)}
        if self.args.device == "cpu":
            for contestant in [self.start(facts) for facts in figures]:
                contestant.prepare(warm_up=self.args.warm_up)
        turns = {facts.dumps(): partial(self._turn, facts, found) for facts, found in figures.items()}
        seconds = in_turn(turns, rounds=self.args.rounds)
        return ratio(seconds[base.dumps()], seconds[it.dumps()]), figures[it], figures[base]

    def _turn(self, facts: Facts, figures: Figures) -> float:
        contestant = self.start(facts)
        contestant.prepare(warm_up=self.args.warm_up)
        taken = figures.turn(contestant, self.args.steps)
        if self.args.device == "cuda":
            self.stop(facts)
        return taken
