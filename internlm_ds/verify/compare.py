"""How far a layout is from one process: losses, gradient norms, replicas, weights, each as one largest difference.

What the differences may be stands here too, by dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.shards import join
from internlm_ds.verify.training import RankResult


@dataclass(frozen=True)
class Tolerances:
    """What differences may be.

    Attributes:
        loss, norm: Relative, in each step.
        weights: Absolute, of each weight; or, if `by_way`, of all together in proportion to how far training took them.
            A weight in bf16 has few digits: a difference in the last one says little about one, much about all.
    """

    loss: float
    norm: float
    weights: float
    by_way: bool = False


FP32 = Tolerances(loss=1e-5, norm=1e-4, weights=1e-5)
BF16 = Tolerances(loss=2e-2, norm=2e-2, weights=1e-1, by_way=True)


@dataclass(frozen=True)
class Measure:
    """One comparison.

    Attributes:
        what: `loss`, `grad norm`, `replicas`, `initial weights` or `final weights`.
        largest: The largest difference; not a number or infinite when there is none to be had.
        allowed: What it may be.
        where: Step or parameter of the largest difference.
    """

    what: str
    largest: float
    allowed: float
    where: str

    @property
    def holds(self) -> bool:
        return self.largest <= self.allowed

    def __str__(self) -> str:
        return f"{self.what} off by {self.largest:.1e} ({self.where}), allowed {self.allowed:.0e}"


def compare(ranks: Sequence[RankResult], whole: RankResult, tolerances: Tolerances) -> list[Measure]:
    """All ranks of a layout against one process that trained the same case."""
    start, end = merge([whole], "before")[0], merge([whole], "after")[0]
    before, _ = merge(ranks, "before")
    after, drift = merge(ranks, "after")
    final = _weights("final weights", after, end, allowed=tolerances.weights)
    if tolerances.by_way and math.isfinite(final.largest):
        final = replace(final, largest=_by_way(after, end, start), where="all weights")
    return [
        _weights("initial weights", before, start, allowed=0.0),
        _series("loss", [rank.losses for rank in ranks], whole.losses, allowed=tolerances.loss),
        _series("grad norm", [rank.norms for rank in ranks], whole.norms, allowed=tolerances.norm),
        _largest("replicas", drift.items(), allowed=0.0),
        final,
    ]


def merge(ranks: Sequence[RankResult], key: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The whole model from what all ranks hold, and by name how far replicas are from each other.

    Args:
        key: `before` or `after`.
    """
    held: dict[str, dict[Shard | None, torch.Tensor]] = {}
    drift: dict[str, float] = {}
    for rank in ranks:
        for name, piece in getattr(rank, key).items():
            known = held.setdefault(name, {}).setdefault(piece.shard, piece.tensor)
            # bit for bit: a difference of -0.0 and 0.0 is none, one of NaN is
            drift[name] = _worse(drift.get(name, 0.0), _distance(known, piece.tensor))
    return {name: shards[None] if None in shards else join(shards) for name, shards in held.items()}, drift


def _series(what: str, found: Sequence[list], expected: list, *, allowed: float) -> Measure:
    """Relative differences by step, the worst rank's."""
    if any(len(values) != len(expected) for values in found):
        return Measure(what, math.inf, allowed, "another number of steps")
    by_step = [
        (f"step {step}", _relative(values[step], value)) for values in found for step, value in enumerate(expected)
    ]
    return _largest(what, by_step, allowed=allowed)


def _relative(found: float | None, expected: float | None) -> float:
    """A step that was not applied has no norm."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _weights(
    what: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, allowed: float
) -> Measure:
    if found.keys() != expected.keys():
        return Measure(what, math.inf, allowed, f"held: {sorted(found.keys() ^ expected.keys())[0]} on one side only")
    return _largest(
        what, ((name, _distance(found[name], weight)) for name, weight in expected.items()), allowed=allowed
    )


def _by_way(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """`|found - expected| / |expected - start|`, Euclidean over all weights."""
    apart = sum(float((found[name].double() - end.double()).square().sum()) for name, end in expected.items())
    way = sum(float((end.double() - start[name].double()).square().sum()) for name, end in expected.items())
    return math.sqrt(apart / way) if way else math.inf


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    return float((a.double() - b.double()).abs().max())


def _largest(what: str, differences: Iterable[tuple[str, float]], *, allowed: float) -> Measure:
    worst, where = 0.0, "-"
    for place, difference in differences:
        if _worse(worst, difference) is not worst:
            worst, where = difference, place
    return Measure(what, worst, allowed, where)


def _worse(a: float, b: float) -> float:
    """The larger of two differences; one that is not a number is larger than any."""
    return a if math.isnan(a) or a >= b else b
