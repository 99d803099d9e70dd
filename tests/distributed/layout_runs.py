"""The tiny model of `internlm_ds.verify` on some layout, for comparison with one process: shared by the tests beside
it. Here: checkpoints on the way, and comparisons that raise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from internlm_ds.train.state import TrainState
from internlm_ds.verify import case as tiny
from internlm_ds.verify import training
from internlm_ds.verify.compare import FP32, compare, merge
from internlm_ds.verify.training import RankResult
from internlm_ds.verify.training import micro_batch as micro_batch

MICRO_BATCHES = tiny.Case().micro_batches


@dataclass(frozen=True)
class Case(tiny.Case):
    """A case that may save.

    Attributes:
        save_folder: Checkpoints are kept here, and a run resumes from the newest.
        in_background: Training goes on while a checkpoint is written.
        load: A folder of weights to start from.
    """

    save_folder: str = ""
    save_every: int = 5
    in_background: bool = False
    load: str = ""

    @property
    def ckpt(self) -> str:
        if self.save_folder:
            folder = f"local:{self.save_folder}"
            when = f"checkpoint_every={self.save_every}, async_upload={self.in_background}"
            return f'enable_save_ckpt=True, save_ckpt_folder="{folder}", {when}'
        if self.load:
            info = f'path="local:{self.load}", content=("model",), ckpt_type="internlm"'
            return f"{tiny.NO_CKPT}, load_ckpt_info=dict({info})"
        return tiny.NO_CKPT


class FakeLoader:
    """A loader's place in the data, as checkpoints keep it."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "num_consumed_samples_in_epoch": 0}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


def train(context, path: str, case: Case, hook=None) -> RankResult:
    """Train on this rank, from and to checkpoints if the case says so; called on every rank of a layout.

    Args:
        hook: `hook(engine)` before the first step; its result is the result's `extra`.
    """
    if not case.save_folder and not case.load:
        return training.train(context, path, case, hook)
    from internlm_ds.parallel import rng
    from internlm_ds.parallel.comm import ProcessComm
    from internlm_ds.train.checkpoints import RunCheckpoints

    rng.seed_everything(training.SEED)
    spec, engine, _ = training.build_engine(context, path)
    state, loader = TrainState(), FakeLoader()
    checkpoints = RunCheckpoints(engine, loader, spec=spec, context=context, comm=ProcessComm())
    checkpoints.restore(state)
    first, before = state.step_count, training.pieces(engine)
    extra = hook(engine) if hook else None

    def save(count: int) -> None:
        state.step_count, state.batch_count, loader.position = count, count, count
        checkpoints.after_step(state, applied=True)

    outcomes = training.take_steps(context, spec, engine, case, first=first, after_step=save)
    checkpoints.close()
    return RankResult(before, training.pieces(engine), outcomes, first, extra)


def merged(ranks: list[RankResult], key: str) -> dict[str, torch.Tensor]:
    """The whole model from what all ranks hold; replicas must be equal."""
    whole, drift = merge(ranks, key)
    for name, difference in drift.items():
        assert difference == 0, f"replicas of {name} differ by {difference:.1e}"
    return whole


def assert_follows(ranks: list[RankResult], whole: RankResult, *, clip: float = 0.0) -> None:
    """The same initial weights, losses within 1e-5, norms within 1e-4 (all above `clip`), final weights within 1e-5."""
    assert all(norm > clip for norm in whole.norms), "clipping must be active in every step"
    wrong = [str(measure) for measure in compare(ranks, whole, FP32) if not measure.holds]
    assert not wrong, "\n".join(wrong)


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
