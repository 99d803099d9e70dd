"""Walks up the ladder on this machine: ranks as processes of it, one line per claim, an exit code.

On the CPU ranks talk over gloo; with a GPU for each rank, over NCCL. What libraries print on ranks is not
shown, and a rank's traceback becomes one line; with `INTERNLM_DS_DEBUG=1` all of it is shown.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from internlm_ds.errors import MachineError
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.testing.ranks import RankError, run_ranks
from internlm_ds.verify.case import Case
from internlm_ds.verify.compare import BF16, FP32, compare
from internlm_ds.verify.ladder import Claim, ladder
from internlm_ds.verify.table import Verdict, Watch, heading, line, summary
from internlm_ds.verify.training import RankResult, train

CPU_RANKS = 4
TIMEOUT_S, TIMEOUT_S_PER_RANK = 60.0, 15.0
Tamper = Callable[[Any], Any]


def verify(
    *,
    ranks: int | None = None,
    quick: bool = False,
    backend: str | None = None,
    tamper: Tamper | None = None,
) -> int:
    """Check every claim and print the table, a line as soon as it is known; 0 when all hold, 1 otherwise.

    Args:
        ranks: Of the largest layouts; all GPUs by default, or 4 on the CPU.
        quick: Fewer claims and steps.
        backend: `gloo` or `nccl`; by default NCCL if there is a GPU for each rank.
        tamper: Called with the engine of every rank of a claim before its first step: for tests of this command.
    Raises:
        MachineError: NCCL is asked for and there are not enough GPUs.
    """
    gpus = torch.cuda.device_count()
    ranks = ranks or gpus or CPU_RANKS
    backend = backend or ("nccl" if gpus >= ranks else "gloo")
    if backend == "nccl" and gpus < ranks:
        raise MachineError(
            f"--backend nccl needs a GPU for each of {ranks} ranks, and torch sees {gpus} here; "
            "use --backend gloo (CPU), or fewer --ranks"
        )
    claims = ladder(ranks, quick=quick)
    print(heading(ranks, backend=backend, claims=claims), flush=True)
    failed: list[Verdict] = []
    watch = Watch(len(claims), stream=sys.stderr)
    with Climber(backend=backend, tamper=tamper) as climber:
        for claim in claims:
            watch.begin(claim.name)
            verdict = climber.check(claim)
            watch.end()
            print(line(verdict), flush=True)
            if not verdict.holds:
                failed.append(verdict)
    print(summary(failed, total=len(claims), seconds=watch.seconds), flush=True)
    return 1 if failed else 0


class Climber:
    """Trains claims and the single processes that they are compared with; each of those once."""

    def __init__(self, *, backend: str, tamper: Tamper | None = None):
        self._backend, self._tamper = backend, tamper
        self._debug = os.environ.get("INTERNLM_DS_DEBUG") == "1"
        self._whole: dict[Case, RankResult] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="internlm-ds-verify-")

    def __enter__(self) -> Climber:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def check(self, claim: Claim) -> Verdict:
        """Train a claim's case and compare."""
        try:
            whole = self._single(claim.case.alone())
            found = self._train(claim.case, self._tamper)
        except RankError as error:
            if self._debug:
                print(error, file=sys.stderr)
            return Verdict(claim, (), failure=_in_a_line(str(error)))
        tolerances = FP32 if claim.case.dtype == "float32" else BF16
        return Verdict(claim, tuple(compare(found, whole, tolerances)))

    def _single(self, case: Case) -> RankResult:
        if case not in self._whole:
            try:
                (self._whole[case],) = self._train(case, None)
            except RankError as error:
                raise RankError(f"one process fails: {error}") from error
        return self._whole[case]

    def _train(self, case: Case, tamper: Tamper | None) -> list[RankResult]:
        return run_ranks(
            _train_on_rank,
            case.layout,
            case.write(Path(self._folder.name)),
            case,
            tamper,
            not self._debug,
            timeout_s=TIMEOUT_S + TIMEOUT_S_PER_RANK * case.layout.world_size,
            backend=self._backend,
        )


def _train_on_rank(context: ParallelContext, path: str, case: Case, tamper: Tamper | None, quiet: bool) -> RankResult:
    if quiet:
        # below Python: what libraries print would tear the table
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    return train(context, path, case, tamper)


def _in_a_line(text: str) -> str:
    """Of a rank's traceback: which rank, and what was raised."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
