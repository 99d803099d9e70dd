"""What `internlm-ds verify` prints: a line for each claim, the reasons at the end, on a terminal what is in work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from internlm_ds.verify.compare import Measure
from internlm_ds.verify.ladder import Claim

NAME_WIDTH, WIDTH = 44, 15
COLUMNS = ("loss", "grad norm", "final weights", "replicas")


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        measures: What was compared; empty when a rank failed.
        failure: Why there is nothing to compare, empty otherwise.
    """

    claim: Claim
    measures: tuple[Measure, ...]
    failure: str = ""

    @property
    def holds(self) -> bool:
        return not self.failure and all(measure.holds for measure in self.measures)

    @property
    def reasons(self) -> list[str]:
        return [self.failure] if self.failure else [str(m) for m in self.measures if not m.holds]


def heading(ranks: int, *, backend: str, claims: Sequence[Claim]) -> str:
    """What is checked, what the numbers mean, names of the columns."""
    device = "GPU, nccl" if backend == "nccl" else f"CPU, {backend}"
    return "\n".join(
        [
            f"a tiny InternLM v1 model, {claims[0].case.steps} steps on up to {ranks} rank(s) ({device}): "
            f"{len(claims)} claims that it equals one process",
            "largest difference (allowed): losses and norms relative; weights absolute, "
            "with bfloat16 relative to how far training took them",
            "",
            f"{'':6}{'':{NAME_WIDTH}}{_cells(COLUMNS)}",
        ]
    )


def line(verdict: Verdict) -> str:
    """One line of the table."""
    start = f"{'pass' if verdict.holds else 'FAIL':<6}{verdict.claim.name:<{NAME_WIDTH}}"
    if verdict.failure:
        return start + verdict.failure
    by_name = {measure.what: measure for measure in verdict.measures}
    numbers = [f"{by_name[name].largest:.1e} ({by_name[name].allowed:.0e})" for name in COLUMNS[:-1]]
    replicas = by_name["replicas"]
    return start + _cells([*numbers, "equal" if replicas.holds else f"{replicas.largest:.1e} (0)"])


def _cells(texts: Sequence[str]) -> str:
    return "  ".join(f"{text:<{WIDTH}}" for text in texts).rstrip()


def summary(failed: Sequence[Verdict], *, total: int, seconds: float) -> str:
    """The end of the table: how many hold, and why each of the others does not."""
    lines = [f"\n{total - len(failed)} of {total} claims hold ({seconds:.0f} s)"]
    lines += [f"FAIL  {verdict.claim.name}: {reason}" for verdict in failed for reason in verdict.reasons]
    return "\n".join(lines)


class Watch:
    """On a terminal, names the claim in work with the share done and the time left; elsewhere the table's lines do.

    Args:
        total: Number of claims.
        clock: Seconds, rising.
    """

    def __init__(self, total: int, *, stream: IO[str], clock: Callable[[], float] = time.monotonic):
        self._total, self._stream, self._clock = total, stream, clock
        self._terminal = stream.isatty()
        self._done, self._start = 0, clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    def begin(self, name: str) -> None:
        left = f", about {self.seconds / self._done * (self._total - self._done):.0f} s left" if self._done else ""
        self._write(f"\r\033[K{self._done + 1}/{self._total} ({self._done / self._total:.0%} done{left}): {name}")

    def end(self) -> None:
        """Clears the line, so that the table's stands alone."""
        self._done += 1
        self._write("\r\033[K")

    def _write(self, text: str) -> None:
        if self._terminal:
            self._stream.write(text)
            self._stream.flush()
