"""The loss in chunks over a split vocabulary, and runs with it switched on beside runs without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_runs import Case, assert_close, assert_follows, train

from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import bounds
from internlm_ds.model.loss import chunked_cross_entropy, cross_entropy
from internlm_ds.model.metrics import token_values
from internlm_ds.parallel import linear_cross_entropy as chunked
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear_cross_entropy import PendingLogits
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)
ON, ZB = "chunked_loss=True", 'pipeline_schedule="zb-h1"'
VOCAB_131 = Case(vocab=131, steps=4, model=(("embed_split_hidden", False),))
WHOLE_LOGITS = (*VOCAB_131.model, ("parallel_output", False))
CASES = {
    "one": replace(VOCAB_131, own=ON),
    "tp2": replace(VOCAB_131, layout=Layout(tensor=2), own=ON),
    "tp2-sp-whole-logits": replace(VOCAB_131, layout=Layout(tensor=2), mode="msp", model=WHOLE_LOGITS, own=ON),
    "pp2-zb": replace(VOCAB_131, layout=Layout(pipe=2), own=f"{ON}, {ZB}"),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_in_chunks_follow_one_process_without(name: str, single, tmp_path: Path):
    case = CASES[name]
    ranks = run_ranks(train, case.layout, case.write(tmp_path), case, timeout_s=100)
    assert_follows(ranks, single(case), clip=case.clip)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=["one", "tp2"])
def test_first_steps_with_and_without(layout: Layout, tmp_path: Path):
    """Losses within 1e-6; the first step's gradients, too, by their largest element."""
    runs = {}
    for on in (True, False):
        case = replace(VOCAB_131, layout=layout, steps=2, own=f"chunked_loss={on}")
        runs[on] = run_ranks(_train_and_keep, layout, case.write(tmp_path), case, timeout_s=100)
    for found, expected in zip(runs[True], runs[False], strict=True):
        assert_close(found.losses, expected.losses, relative=1e-6, what="loss")
        assert found.extra.keys() == expected.extra.keys() and "head.weight" in found.extra
        for name, gradient in expected.extra.items():
            allowed = 1e-6 * gradient.abs().max().item()
            torch.testing.assert_close(found.extra[name], gradient, rtol=0, atol=allowed, msg=name)


def _train_and_keep(context, path: str, case: Case):
    return train(context, path, case, hook=_first_gradients)


def _first_gradients(engine) -> dict[str, torch.Tensor]:
    """Filled at the first step."""
    kept: dict[str, torch.Tensor] = {}

    def keep(engine) -> None:
        for name, parameter in engine.logical_parameters():
            kept.setdefault(name, parameter.grad.detach().clone())

    engine.on_gradients = keep
    return kept


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_equals_a_whole_one(size: int):
    run_ranks(_split, Layout(tensor=size), timeout_s=100)


def _split(context) -> None:
    chunked.rows_of_chunk = lambda width, *, device: 3
    axis, generator = context.tensor, torch.Generator().manual_seed(7)
    hidden = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(13, 6, generator=generator, dtype=torch.float64)
    hidden[1] *= 1000  # exponentials would overflow without the shift
    weight[12] = weight[0]  # ties over two ranks
    start, stop = bounds(13, size=axis.size, rank=axis.rank)
    for smoothing in (0.0, 0.1):
        for labels in (torch.tensor([0, 12, -100, 6, 7, 12, -100, 3]), torch.full((8,), -100)):
            whole = [x.clone().requires_grad_() for x in (hidden, weight)]
            part = [x.clone().requires_grad_() for x in (hidden, weight[start:stop])]
            logits = whole[0] @ whole[1].t()
            expected = cross_entropy(logits, labels, label_smoothing=smoothing)
            found, tokens = chunked_cross_entropy(PendingLogits(*part, axis, 13), labels, label_smoothing=smoothing)
            torch.testing.assert_close(found, expected, equal_nan=True)
            assert torch.equal(tokens.likeliest, logits.argmax(-1))
            counted = labels != -100
            nll = token_values(logits, labels)[:, 2]
            torch.testing.assert_close(tokens.nll.masked_fill(~counted, 0), nll)
            if not counted.any():
                continue
            (3 * expected).backward()
            (3 * found).backward()
            torch.distributed.all_reduce(part[0].grad, group=axis.group)
            torch.testing.assert_close(part[0].grad, whole[0].grad)
            torch.testing.assert_close(part[1].grad, whole[1].grad[start:stop])
    _nan_reaches_every_rank(axis, hidden, weight[start:stop])


def _nan_reaches_every_rank(axis: Axis, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    bad = weight.clone()
    if axis.rank == 0:
        bad[0, 0] = torch.nan
    assert chunked_cross_entropy(PendingLogits(hidden, bad, axis, 13), torch.zeros(8).long())[0].isnan()
