"""Which claims there are for so many ranks, on paper: every way to lay them out, and every feature on top.

A claim says that a case equals one process. Checking it is `run`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from internlm_ds.layout.ranks import Layout, divisors
from internlm_ds.verify.case import Case

STEPS, QUICK_STEPS = 5, 3
ZB = 'pipeline_schedule="zb-h1"'


@dataclass(frozen=True)
class Claim:
    """A case that must equal one process.

    Attributes:
        feature: What is tried besides the layout; empty for the layout alone.
    """

    feature: str
    case: Case

    @property
    def name(self) -> str:
        """In InternLM's words: `data=2 tensor=2 zero1=1 bfloat16`."""
        layout = self.case.layout
        sizes = (("data", layout.data), ("tensor", layout.tensor), ("pipeline", layout.pipe))
        words = [f"{axis}={size}" for axis, size in sizes if size > 1]
        return " ".join([*(words or ["one process"]), *([self.feature] if self.feature else [])])


def ladder(ranks: int, *, quick: bool = False) -> list[Claim]:
    """All claims, few ranks first.

    Args:
        ranks: Of the largest layouts; smaller ones use a divisor of it.
        quick: Each layout of all ranks once, each feature once, fewer steps.
    """
    model = _model_for(ranks, steps=QUICK_STEPS if quick else STEPS)
    claims = [claim for layout in layouts(ranks) for claim in _claims(replace(model, layout=layout), ranks=ranks)]
    return _thinned(claims, ranks=ranks) if quick else claims


def layouts(ranks: int) -> list[Layout]:
    """Every layout whose ranks divide `ranks`, one process first, mixtures behind what they mix.

    The optimizer's states are shared by all of data parallel.
    """
    found = [
        Layout(pipe=size // data // tensor, data=data, tensor=tensor, zero=data)
        for size in divisors(ranks)
        for data in divisors(size)
        for tensor in divisors(size // data)
        # heads and the width of the MLP are powers of two here
        if tensor & (tensor - 1) == 0
    ]
    return sorted(found, key=lambda layout: (layout.world_size, _num_axes(layout)))


def _num_axes(layout: Layout) -> int:
    return sum(size > 1 for size in (layout.pipe, layout.data, layout.tensor))


def _model_for(ranks: int, *, steps: int) -> Case:
    """A model that all these layouts can split: every stage has two chunks, some have more layers than others."""
    heads = max(4, ranks & -ranks)
    # each data-parallel rank has as many micro-batches as there are stages, or a multiple
    return Case(steps=steps, layers=2 * ranks + 2, hidden=8 * heads, heads=heads, micro_batches=ranks * -(-4 // ranks))


def _claims(case: Case, *, ranks: int) -> Iterator[Claim]:
    """The layout alone, then with each feature that it allows. What concerns no axis is tried where all ranks work."""
    layout = case.layout
    if layout.world_size > 1:
        yield Claim("", case)
    if layout.tensor > 1:
        yield Claim("sequence_parallel", replace(case, mode="msp"))
    if layout.pipe > 1 or ranks == 1:
        yield Claim("num_chunks=2", _with_model(case, layout=replace(layout, chunks=2), num_chunks=2))
    if layout.pipe > 1:
        yield Claim("zb-h1", replace(case, own=ZB))
    for zero in divisors(layout.data)[:-1]:
        yield Claim(f"zero1={zero}", replace(case, layout=replace(layout, zero=zero)))
    if layout.world_size == ranks:
        # half of the layers is half of each stage's
        for share in (0.5, 1) if layout.pipe > 1 or ranks == 1 else (1,):
            yield Claim(f"checkpoint={share}", _with_model(case, layout=layout, checkpoint=share))
    if layout.world_size == ranks > 1:
        yield Claim("unpacked", replace(case, packed=False))
        yield Claim("bfloat16", replace(case, dtype="bfloat16"))


def _with_model(case: Case, *, layout: Layout, **keys: object) -> Case:
    return replace(case, layout=layout, model=(*case.model, *keys.items()))


def _thinned(claims: list[Claim], *, ranks: int) -> list[Claim]:
    """Layouts of all ranks, and the last claim of each feature: it mixes the most axes."""
    last = {claim.feature: claim for claim in claims}
    return [
        claim
        for claim in claims
        if (claim is last[claim.feature] or not claim.feature) and claim.case.layout.world_size == ranks
    ]
