"""The reference's loss-scale tables followed by fp16 training: overflows are injected into the engine's gradients.

DeepSpeed asks whether this CPU computes in fp16; torch emulates it, so the question is answered yes here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import entries

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify.case import Case

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("layout", [Layout(), Layout(pipe=2)], ids=["one-process", "pipe2"])
def test_fp16_training_follows_the_loss_scale_table(layout: Layout, tmp_path: Path):
    cases = entries("schedulers", "grad_scaler.json")
    path = Case(layout=layout, dtype="float16", layers=2).write(tmp_path)
    for rank in run_ranks(_follow, layout, path, cases, timeout_s=100):
        for case, steps in zip(cases, rank, strict=True):
            for index, (overflow, want, got) in enumerate(
                zip(case["overflow"], case["after_update"], steps, strict=True)
            ):
                assert got == [*want, not overflow], (case["kwargs"], index)


def _follow(context, path: str, cases: list[dict]) -> list[list[list]]:
    from deepspeed.accelerator import get_accelerator

    from internlm_ds.optim.loss_scale import DynamicLossScale
    from internlm_ds.verify.training import build_engine, micro_batch

    type(get_accelerator()).is_fp16_supported = lambda self: True
    _, engine, _ = build_engine(context, path)
    batch = [micro_batch(0, j, vocab=64) for j in range(2)]
    found = []
    for case in cases:
        state = DynamicLossScale(**case["kwargs"])
        engine.install_loss_scale(state)
        steps = []
        for overflow in case["overflow"]:
            # one rank's one gradient decides for all; the others are zero, whatever this scale made of them
            engine.on_gradients = lambda e, bad=bool(overflow): _set_gradients(e, bad=bad)
            engine.set_hyperparameters(lr=1e-3, betas=(0.9, 0.95))
            outcome = engine.train_step(batch)
            steps.append([engine.current_loss_scale, state.growth_step, state.hysteresis_step, outcome.applied])
        found.append(steps)
    return found


def _set_gradients(engine, *, bad: bool) -> None:
    for param in engine.module.parameters():
        if param.grad is not None:
            param.grad.zero_()
    if bad and engine.is_first_stage():
        next(iter(engine.module.parameters())).grad.view(-1)[0] = float("inf")
