"""Gradients in one flat tensor give the run that DeepSpeed's buckets give, and are used where the report says so."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from internlm_ds.engine import optimizer
from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.translate import translate
from internlm_ds.translate.optimizer_kind import sums_in_place
from internlm_ds.verify import training
from internlm_ds.verify.case import Case


def both_ways(context, path: str, case: Case):
    """Outcomes and weights in place and by DeepSpeed; and whether the first way was the one in place."""
    found = []
    for possible in (optimizer.possible, lambda _: False):
        spec, engine, _ = training.build_engine(context, path)
        with mock.patch.object(optimizer, "possible", possible):
            outcomes = training.take_steps(context, spec, engine, case)
        flat = getattr(engine.optimizer, "_flat", None) is not None
        found.append((outcomes, training.pieces(engine), flat, sums_in_place(translate(spec).ds_config)))
    return found


@pytest.mark.parametrize("layout", [Layout(data=2, zero=2), Layout(data=2, zero=1), Layout(pipe=2)], ids=str)
def test_the_same_run_as_with_buckets(layout: Layout, tmp_path: Path):
    case = Case(layout=layout, steps=4, layers=2)
    for ours, theirs in run_ranks(both_ways, layout, case.write(tmp_path), case, timeout_s=100):
        assert (ours[2], theirs[2]) == (True, False)
        torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-6, atol=0)
        for name, piece in ours[1].items():
            torch.testing.assert_close(piece.tensor, theirs[1][name].tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_paper_and_engine_agree_where_that_is(dtype: str, tmp_path: Path):
    case = Case(dtype=dtype, steps=1, layers=1)
    ((ours, _),) = run_ranks(both_ways, Layout(), case.write(tmp_path), case)
    assert ours[2] == ours[3] == (dtype == "float32")
