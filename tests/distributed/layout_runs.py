"""A tiny model trained on some layout, for comparison with one process: shared by the tests beside it.

The data of a step are always the same 4 packed micro-batches, dealt out over the data axis, so that every layout
minimises the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.shards import join, shard_of_parameter

MICRO_BATCHES, TOKENS = 4, 32
CONFIG = """
ckpt = dict({ckpt})
data = dict(seq_len=16, micro_num={micro_num}, micro_bsz=2, total_steps=10, skip_batches="", rampup_batch_size="",
            pack_sample_into_one=False)
grad_scaler = dict(fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000), growth_factor=2,
                   backoff_factor=0.5, max_scale=2**24, hysteresis=2)
hybrid_zero_optimizer = dict(reduce_bucket_size=2**20, clip_grad_norm={clip})
loss = dict(label_smoothing=0.1)
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=10, warmup_ratio=0.2, eta_min=1e-4)
beta2_scheduler = dict(init_beta2=0.95, c=0)
model = dict(num_layers={layers}, hidden_size=32, num_attention_heads=4, vocab_size={vocab}, mlp_ratio=2,
             dtype="torch.{dtype}", **{model})
parallel = dict(zero1={zero}, tensor=dict(size={tensor}, mode="{mode}"), pipeline={pipe})
internlm_ds = dict({own})
"""
NO_CKPT = "enable_save_ckpt=False, auto_resume=False"


@dataclass(frozen=True)
class Case:
    """What is trained; everything but the layout and `mode` decides the numbers.

    Attributes:
        mode: `mtp`, or `msp` for sequence parallelism.
        model, own: More keys of the `model` and `internlm_ds` dicts.
        save_folder: Checkpoints are kept here, and a run resumes from the newest.
        load: A folder of weights to start from.
    """

    layout: Layout = field(default_factory=Layout)
    mode: str = "mtp"
    dtype: str = "float32"
    steps: int = 10
    layers: int = 4
    vocab: int = 64
    clip: float = 0.3
    model: tuple[tuple[str, Any], ...] = (("embed_split_hidden", True),)
    own: str = ""
    save_folder: str = ""
    save_every: int = 5
    load: str = ""

    def write(self, folder: Path) -> str:
        """The configuration file; returns its path."""
        layout = self.layout
        saving = (
            f'enable_save_ckpt=True, save_ckpt_folder="local:{self.save_folder}", checkpoint_every={self.save_every}'
        )
        loading = f'{NO_CKPT}, load_ckpt_info=dict(path="local:{self.load}", content=("model",), ckpt_type="internlm")'
        path = folder / f"{layout.pipe}-{layout.data}-{layout.tensor}-{self.mode}.py"
        text = CONFIG.format(
            ckpt=saving if self.save_folder else loading if self.load else NO_CKPT,
            micro_num=MICRO_BATCHES // layout.data,
            layers=self.layers,
            vocab=self.vocab,
            clip=self.clip,
            dtype=self.dtype,
            model=dict(self.model),
            zero=layout.zero,
            tensor=layout.tensor,
            mode=self.mode,
            pipe=layout.pipe,
            own=self.own,
        )
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Piece:
    """A parameter as one rank holds it."""

    tensor: torch.Tensor
    shard: Shard | None


@dataclass(frozen=True)
class RankResult:
    """What one rank saw: weights before and after, `(loss, norm)` of each step, and whatever else a test asks for."""

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


class FakeLoader:
    """A loader's place in the data, as checkpoints keep it."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "num_consumed_samples_in_epoch": 0}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


def train(context, path: str, case: Case, hook=None) -> RankResult:
    """Train on this rank; called on every rank of a layout.

    Args:
        hook: `hook(engine)` before the first step; its result is the result's `extra`.
    """
    from internlm_ds.optim.schedules import LrSchedule
    from internlm_ds.parallel import rng
    from internlm_ds.parallel.comm import ProcessComm
    from internlm_ds.train.checkpoints import RunCheckpoints
    from internlm_ds.train.state import TrainState

    rng.seed_everything(11)
    spec, engine, _ = build_engine(context, path)
    schedule, state, loader = LrSchedule.from_config(spec.config), TrainState(), FakeLoader()
    checkpoints = None
    if case.save_folder or case.load:
        checkpoints = RunCheckpoints(engine, loader, spec=spec, context=context, comm=ProcessComm())
        checkpoints.restore(state)
    first, before = state.step_count, pieces(engine)
    extra = hook(engine) if hook else None
    outcomes = []
    for step in range(first, case.steps):
        engine.set_hyperparameters(lr=schedule.at(step), betas=(0.9, 0.95))
        outcome = engine.train_step(micro_batches(step, context, vocab=case.vocab))
        outcomes.append((outcome.loss, outcome.grad_norm))
        state.step_count, state.batch_count, loader.position = step + 1, step + 1, step + 1
        if checkpoints is not None:
            checkpoints.after_step(state, applied=True)
    if checkpoints is not None:
        checkpoints.close()
    return RankResult(before, pieces(engine), outcomes, first, extra)


def build_engine(context, path: str):
    """`(RunSpec, Engine, StageLoss)` of a configuration on this rank."""
    from internlm_ds.engine.build import build
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries, split_vocabulary, stage_bounds
    from internlm_ds.train.metrics import StageLoss
    from internlm_ds.translate import translate

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


def pieces(engine) -> dict[str, Piece]:
    """This rank's weights."""
    return {
        name: Piece(param.detach().clone(), shard_of_parameter(param)) for name, param in engine.logical_parameters()
    }


def micro_batches(step: int, context, *, vocab: int) -> list:
    """This rank's micro-batches of a step."""
    return [micro_batch(step, j, vocab=vocab) for j in range(MICRO_BATCHES)][context.data.rank :: context.data.size]


def micro_batch(step: int, j: int, *, vocab: int):
    """Three packed samples."""
    generator = torch.Generator().manual_seed(100 * step + j)
    tokens = torch.randint(1, vocab, (TOKENS + 1,), generator=generator)
    borders = torch.full((TOKENS + 1,), TOKENS, dtype=torch.int32)
    borders[:4] = torch.tensor([0, 5 + j, 16, TOKENS], dtype=torch.int32)
    return (tokens[:-1].clone(), borders), (tokens[1:].clone(), torch.zeros(TOKENS, dtype=torch.int64))


def merged(ranks: list[RankResult], key: str) -> dict[str, torch.Tensor]:
    """The whole model from what all ranks hold; replicas must be equal bit for bit."""
    held: dict[str, dict[Shard | None, torch.Tensor]] = {}
    for rank in ranks:
        for name, piece in getattr(rank, key).items():
            known = held.setdefault(name, {}).setdefault(piece.shard, piece.tensor)
            assert known.equal(piece.tensor), f"replicas of {name} differ"
    return {name: shards[None] if None in shards else join(shards) for name, shards in held.items()}


def assert_follows(ranks: list[RankResult], whole: RankResult, *, clip: float = 0.0) -> None:
    """The same initial weights, losses within 1e-5, norms within 1e-4 (all above `clip`), final weights within 1e-5."""
    expected = merged([whole], "before")
    before = merged(ranks, "before")
    assert before.keys() == expected.keys()
    for name, weight in expected.items():
        assert before[name].equal(weight), f"initial {name}"
    assert all(norm > clip for norm in whole.norms), "clipping must be active in every step"
    for rank in ranks:
        assert_close(rank.losses, whole.losses, relative=1e-5, what="loss")
        assert_close(rank.norms, whole.norms, relative=1e-4, what="norm")
    after = merged(ranks, "after")
    for name, weight in merged([whole], "after").items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-5, msg=lambda m, n=name: f"final {n}: {m}")


def assert_close(found: list[float], expected: list[float], *, relative: float, what: str) -> None:
    """Every step's number, with the largest difference in the message."""
    assert len(found) == len(expected), (len(found), len(expected))
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    assert worst <= relative, f"{what} differs by {worst:.2e} (relative), allowed {relative:.0e}: {found} {expected}"


def accumulation_dtypes(engine) -> set[str]:
    """Filled at each step with the dtypes that gradients are summed in."""
    seen: set[str] = set()
    engine.on_gradients = lambda e: seen.update(str(p._hp_grad.dtype) for p in e.module.parameters())
    return seen
