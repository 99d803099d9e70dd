"""Pipelines with chunks, with put-off weight gradients and with the user's own borders against one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_runs import MICRO_BATCHES, Case, RankResult, assert_close, assert_follows, micro_batch, train

from internlm_ds.layout.ranks import Layout
from internlm_ds.schedule.lists import Pipeline
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

EMBED = Case().model
ZB = 'pipeline_schedule="zb-h1"'
EVALUATED = (1, 2, 3, 5, 6)
GROWN = (2 * MICRO_BATCHES, MICRO_BATCHES)


def chunked(layout: Layout, **more) -> Case:
    return Case(layout=layout, model=(*EMBED, ("num_chunks", layout.chunks)), **more)


CASES = {
    "pp2-2chunks": chunked(Layout(pipe=2, chunks=2)),
    "pp2-3chunks-recompute": Case(
        layout=Layout(pipe=2, chunks=3), layers=6, model=(*EMBED, ("num_chunks", 3), ("checkpoint", 1.0))
    ),
    "pp4-2chunks": chunked(Layout(pipe=4, chunks=2), layers=8),
    "pp2-dp2-2chunks": chunked(Layout(pipe=2, data=2, zero=2, chunks=2)),
    "pp2-tp2-2chunks": chunked(Layout(pipe=2, tensor=2, chunks=2)),
    "pp1-2chunks": chunked(Layout(chunks=2)),
    "pp2-zb": Case(layout=Layout(pipe=2), own=ZB),
    "pp4-6-layers-zb-recompute": Case(layout=Layout(pipe=4), layers=6, own=ZB, model=(*EMBED, ("checkpoint", 0.5))),
    "pp2-tp2-sp-zb": Case(layout=Layout(pipe=2, tensor=2), own=ZB, mode="msp"),
    "pp2-own-borders": Case(layout=Layout(pipe=2), own="pipeline_bounds=[0, 1, 4]"),
    "pp2-2chunks-own-borders": chunked(Layout(pipe=2, chunks=2), layers=6, own="pipeline_bounds=[0, 1, 2, 5, 6]"),
}
RECEIVING_AHEAD = ("pp2-3chunks-recompute", "pp4-2chunks")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process makes of a case, evaluation and growing steps included."""
    known: dict[Case, RankResult] = {}

    def get(case: Case) -> RankResult:
        alone = replace(case, layout=Layout(), mode="mtp", own="", model=EMBED)
        if alone not in known:
            path = alone.write(tmp_path_factory.mktemp("whole"))
            (known[alone],) = run_ranks(_run, Layout(), path, alone, timeout_s=100)
        return known[alone]

    return get


@pytest.mark.parametrize("name", CASES)
def test_pipeline_layout_follows_one_process(name: str, whole, tmp_path: Path):
    case = CASES[name]
    path = _receiving_ahead(case, tmp_path) if name in RECEIVING_AHEAD else case.write(tmp_path)
    _check(case, whole(case), path)


@pytest.mark.parametrize("name", ["pp2-2chunks", "pp2-zb"])
def test_bf16_pipeline_layout_follows_one_process(name: str, whole, tmp_path: Path):
    case = replace(CASES[name], dtype="bfloat16", steps=6)
    expected = whole(case)
    for rank in run_ranks(_run, case.layout, case.write(tmp_path), case, timeout_s=200):
        assert_close(rank.losses, expected.losses, relative=2e-3, what="loss")
        assert_close(rank.norms, expected.norms, relative=2e-2, what="norm")
        for count, loss in rank.extra["evaluated"].items():
            assert loss == pytest.approx(expected.extra["evaluated"][count], rel=2e-3)


def test_a_message_of_another_size_is_refused(tmp_path: Path):
    case = Case(layout=Layout(pipe=2), steps=1)
    messages = run_ranks(_send_short, case.layout, case.write(tmp_path), case, timeout_s=100)
    assert messages[0] == (
        "stage 0 would send (((16, 32), torch.float32), ((17,), torch.int32)), but all messages of a run look like its "
        "first: (((32, 32), torch.float32), ((33,), torch.int32)); give every micro-batch the same length"
    )


# ---- on the ranks ---------------------------------------------------------------------------------------------------


def _run(context, path: str, case: Case) -> RankResult:
    """Train, then evaluate other numbers of micro-batches, then take steps of other sizes."""
    held: list = []
    result = train(context, path, case, hook=held.append)
    (engine,) = held
    sent = dict(engine.worker.channels.num_sent) if engine.worker.channels else {}
    evaluated = {
        count: engine.evaluate_batch(_dealt(50, count, context, case))
        for count in EVALUATED
        if count % context.data.size == 0
    }
    grown = [engine.train_step(_dealt(60 + i, count, context, case)) for i, count in enumerate(GROWN)]
    extra = {"sent": sent, "evaluated": evaluated, "grown": [(g.loss, g.grad_norm) for g in grown]}
    return replace(result, extra=extra)


def _dealt(step: int, count: int, context, case: Case) -> list:
    return [micro_batch(step, j % 8, vocab=case.vocab) for j in range(count)][context.data.rank :: context.data.size]


def _send_short(context, path: str, case: Case) -> str:
    from internlm_ds.errors import LayoutError

    held: list = []
    train(context, path, case, hook=held.append)
    (tokens, _), (labels, types) = micro_batch(0, 0, vocab=case.vocab)
    borders = torch.full((17,), 16, dtype=torch.int32)
    borders[0] = 0
    short = ((tokens[:16], borders), (labels[:16], types[:16]))
    if context.pipe.rank == 1:
        return ""
    with pytest.raises(LayoutError) as error:
        held[0].worker.run(Pipeline(2).training(0, micro_batches=1), [short], micro_batches=1)
    return str(error.value)


# ---- comparing ------------------------------------------------------------------------------------------------------


def _check(case: Case, expected: RankResult, path: str) -> None:
    ranks = run_ranks(_run, case.layout, path, case, timeout_s=200)
    assert_follows(ranks, expected, clip=case.clip)
    for rank in ranks:
        for count, loss in rank.extra["evaluated"].items():
            assert loss == pytest.approx(expected.extra["evaluated"][count], rel=1e-5), f"evaluation of {count}"
        for found, wanted in zip(rank.extra["grown"], expected.extra["grown"], strict=True):
            assert found == (pytest.approx(wanted[0], rel=1e-5), pytest.approx(wanted[1], rel=1e-4))
    _check_messages(ranks, case)


def _check_messages(ranks: list[RankResult], case: Case) -> None:
    """As many messages as the formula says, in every pipeline."""
    layout = case.layout
    if layout.pipe == 1:
        return
    pipeline = Pipeline(stages=layout.pipe, chunks=layout.chunks)
    pipelines = layout.data * layout.tensor
    wanted = case.steps * pipelines * pipeline.num_messages(MICRO_BATCHES // layout.data)
    for kind in ("activation", "gradient"):
        assert sum(rank.extra["sent"].get(kind, 0) for rank in ranks) == wanted, kind


def _receiving_ahead(case: Case, folder: Path) -> str:
    """The case's file, with `interleaved_overlap`."""
    path = case.write(folder)
    with open(path, "a") as file:
        file.write(f'parallel["pipeline"] = dict(size={case.layout.pipe}, interleaved_overlap=True)\n')
    return path
