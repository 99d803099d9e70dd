"""Infinity or NaN in the gradients of one rank alone: all ranks skip the step, and agree on the loss scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify.case import Case

pytestmark = pytest.mark.timeout(120)

LAYOUTS = {
    "pp2-dp2": Layout(pipe=2, data=2, zero=2),
    "pp2-dp2-zero1=1": Layout(pipe=2, data=2, zero=1),
    "tp2": Layout(tensor=2),
}
# a growth interval far away, hysteresis 2: the scale halves at the second infinity; NaN leaves it
SCALES = {"float16": [2.0**16, 2.0**16, 2.0**16, 2.0**15, 2.0**15], "bfloat16": [1.0] * 5, "float32": [1.0] * 5}
# what one rank's gradients hold at each step
INJECTED = [None, torch.inf, torch.nan, torch.inf, None]


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_skip_what_one_cannot_apply(name: str, dtype: str, tmp_path: Path):
    layout = LAYOUTS[name]
    case = Case(layout=layout, dtype=dtype)
    for rank in {0, layout.world_size - 1}:
        answers = run_ranks(_train_with_bad_gradients, layout, case.write(tmp_path), case, rank)
        for applied, scales, changed in answers:
            assert applied == [True, False, False, False, True]
            assert changed == applied, "weights change when the step is applied, and only then"
            assert scales == SCALES[dtype]


def _train_with_bad_gradients(context, path: str, case: Case, rank: int) -> tuple[list[bool], list[float], list[bool]]:
    """Was each step applied, the loss scale after it, and did this rank's weights change?"""
    from deepspeed.accelerator import get_accelerator

    from internlm_ds.verify.training import build_engine, micro_batches

    type(get_accelerator()).is_fp16_supported = lambda self: True  # torch emulates it on a CPU
    _, engine, _ = build_engine(context, path)
    step = 0

    def inject(engine) -> None:
        if context.rank == rank and INJECTED[step] is not None:
            parameter = next(engine.module.parameters())
            _gradient(engine, parameter).view(-1)[3] = INJECTED[step]

    engine.on_gradients = inject
    applied, scales, changed = [], [], []
    for step in range(len(INJECTED)):
        before = [p.detach().clone() for p in engine.module.parameters()]
        engine.set_hyperparameters(lr=1e-2, betas=(0.9, 0.95))
        outcome = engine.train_step(micro_batches(step, context, case))
        assert (outcome.grad_norm is None) is not outcome.applied
        applied.append(outcome.applied)
        scales.append(engine.current_loss_scale)
        changed.append(not all(p.equal(b) for p, b in zip(engine.module.parameters(), before, strict=True)))
    return applied, scales, changed


def _gradient(engine, parameter: torch.nn.Parameter) -> torch.Tensor:
    """What will be reduced over data-parallel ranks."""
    if engine.using_bf16_optimizer:
        return parameter._hp_grad
    return engine.optimizer.get_gradient_for_reduction(parameter)
