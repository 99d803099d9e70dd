"""Pipeline stages and data-parallel ranks against one process: losses, norms and weights of ten clipped steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from layout_runs import Case, RankResult, accumulation_dtypes, assert_close, assert_follows, merged, train

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(240)

DP4_ZERO2 = Layout(data=4, zero=2)
EMBED = Case().model
CASES = {
    "dp2": Case(layout=Layout(data=2, zero=2)),
    "dp2-zero1=1-recompute": Case(layout=Layout(data=2, zero=1), model=(*EMBED, ("checkpoint", 1.0))),
    "dp4-zero1=2": Case(layout=DP4_ZERO2),
    "pp2": Case(layout=Layout(pipe=2)),
    "pp4-6-layers-recompute": Case(layout=Layout(pipe=4), layers=6, model=(*EMBED, ("checkpoint", 0.5))),
    "pp2-dp2-recompute": Case(layout=Layout(pipe=2, data=2, zero=2), model=(*EMBED, ("checkpoint", 0.5))),
}


@pytest.mark.parametrize("name", CASES)
def test_layout_follows_one_process(name: str, single, tmp_path: Path):
    case = CASES[name]
    ranks = run_ranks(train, case.layout, case.write(tmp_path), case, timeout_s=200)
    assert_follows(ranks, single(case), clip=case.clip)


@pytest.mark.parametrize("layout", [Layout(pipe=2), Layout(data=2, zero=1), DP4_ZERO2], ids=str)
def test_bf16_layout_follows_one_process(layout: Layout, single, tmp_path: Path):
    case = Case(layout=layout, dtype="bfloat16", steps=6)
    ranks = run_ranks(_train_and_look, layout, case.write(tmp_path), case, timeout_s=200)
    whole = single(replace(case, layout=Layout()))
    for rank in ranks:
        assert rank.extra == {"torch.float32"}, "gradients are summed in fp32"
        assert_close(rank.losses, whole.losses, relative=2e-3, what="loss")
        assert_close(rank.norms, whole.norms, relative=2e-2, what="norm")
    merged(ranks, "after")  # replicas are equal bit for bit


def _train_and_look(context, path: str, case: Case) -> RankResult:
    return train(context, path, case, hook=accumulation_dtypes)
