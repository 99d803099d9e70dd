"""Training a case on one rank, and what the rank saw: called on every rank of a layout (`testing.ranks.run_ranks`).

The data of a step are the same micro-batches for every layout, dealt out over the data axis, so that all minimise the
same loss. Only a rank loads the engine: who compares results need not wait for DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from internlm_ds.layout.shards import Shard
from internlm_ds.optim.schedules import LrSchedule
from internlm_ds.parallel import rng
from internlm_ds.parallel.context import ParallelContext
from internlm_ds.parallel.shards import shard_of_parameter
from internlm_ds.runspec import RunSpec, resolve
from internlm_ds.translate import translate
from internlm_ds.verify.case import Case

if TYPE_CHECKING:
    from internlm_ds.engine.engine import Engine
    from internlm_ds.train.metrics import StageLoss

TOKENS = 32
SEED = 11


@dataclass(frozen=True)
class Piece:
    """A parameter as one rank holds it."""

    tensor: torch.Tensor
    shard: Shard | None


@dataclass(frozen=True)
class RankResult:
    """What one rank saw: weights before and after, `(loss, norm)` of each step, and whatever else a caller asks for."""

    before: dict[str, Piece]
    after: dict[str, Piece]
    outcomes: list[tuple[float, float | None]]
    first_step: int = 0
    extra: Any = None

    @property
    def losses(self) -> list[float]:
        return [loss for loss, _ in self.outcomes]

    @property
    def norms(self) -> list[float | None]:
        return [norm for _, norm in self.outcomes]


def train(context: ParallelContext, path: str, case: Case, hook: Callable[[Engine], Any] | None = None) -> RankResult:
    """Train a case whose configuration file is `path`.

    Args:
        hook: Called with the engine before the first step; its result is the result's `extra`.
    """
    rng.seed_everything(SEED)
    spec, engine, _ = build_engine(context, path)
    before = pieces(engine)
    extra = hook(engine) if hook else None
    outcomes = take_steps(context, spec, engine, case)
    return RankResult(before, pieces(engine), outcomes, extra=extra)


def build_engine(context: ParallelContext, path: str) -> tuple[RunSpec, Engine, StageLoss]:
    """The engine of a configuration on this rank."""
    from internlm_ds.engine.build import build
    from internlm_ds.train.assemble import layer_entries, split_vocabulary, stage_bounds
    from internlm_ds.train.metrics import StageLoss

    spec = resolve(path, world_size=context.layout.world_size)
    loss = StageLoss(label_smoothing=0.1, dataset_types=(), context=context, vocab_size=split_vocabulary(spec.config))
    entries = layer_entries(spec, context, seed=7)
    engine = build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=loss,
    )
    return spec, engine, loss


def take_steps(
    context: ParallelContext,
    spec: RunSpec,
    engine: Engine,
    case: Case,
    *,
    first: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> list[tuple[float, float | None]]:
    """`(loss, norm)` of the steps from `first` on; `after_step` is called with the number of steps done."""
    schedule = LrSchedule.from_config(spec.config)
    outcomes = []
    for step in range(first, case.steps):
        engine.set_hyperparameters(lr=schedule.at(step), betas=(0.9, 0.95))
        outcome = engine.train_step(micro_batches(step, context, case))
        outcomes.append((outcome.loss, outcome.grad_norm))
        if after_step is not None:
            after_step(step + 1)
    return outcomes


def pieces(engine: Engine) -> dict[str, Piece]:
    """This rank's weights."""
    return {
        name: Piece(param.detach().cpu().clone(), shard_of_parameter(param))
        for name, param in engine.logical_parameters()
    }


def micro_batches(step: int, context: ParallelContext, case: Case) -> list[Any]:
    """This rank's micro-batches of a step."""
    whole = [micro_batch(step, j, vocab=case.vocab, packed=case.packed) for j in range(case.micro_batches)]
    return whole[context.data.rank :: context.data.size]


def micro_batch(step: int, j: int, *, vocab: int, packed: bool = True) -> Any:
    """Three packed samples that end at other places in each micro-batch, or two rows of one sample each."""
    generator = torch.Generator().manual_seed(100 * step + j)
    tokens = torch.randint(1, vocab, (TOKENS + 1,), generator=generator)
    borders = torch.full((TOKENS + 1,), TOKENS, dtype=torch.int32)
    borders[:2] = torch.tensor([0, TOKENS // 2])
    if packed:
        borders[:3] = torch.tensor([0, 5 + j % 8, TOKENS // 2])
    return (tokens[:-1].clone(), borders), (tokens[1:].clone(), torch.zeros(TOKENS, dtype=torch.int64))
