"""Tokens per step, the ramp-up and what chunks demand of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.config.schema import DataConfig
from internlm_ds.errors import LayoutError
from internlm_ds.layout.batch import BatchPlan, Rampup, parse_rampup
from internlm_ds.layout.ranks import Layout


def test_the_tutorial_has_131072_tokens_per_step():
    plan = BatchPlan.from_config(DataConfig(micro_num=4, micro_bsz=2, seq_len=2048), data_size=8)
    assert (plan.packed_length, plan.tokens_per_step, plan.sequences_per_step) == (4096, 131072, 64)


def test_rampup_grows_in_steps():
    plan = BatchPlan(1, 8, micro_num=6, data=2, rampup=Rampup(2, 2, 3))
    assert [plan.micro_num_at(b) for b in range(8)] == [2, 2, 2, 4, 4, 4, 6, 6]
    assert plan.sizes == (2, 4, 6)
    assert (plan.rampup_steps, plan.rampup_samples) == (6, 18)
    assert (plan.tokens_at(0), plan.tokens_at(7)) == (32, 96)


def test_rampup_that_does_not_divide_ends_at_the_full_size():
    plan = BatchPlan(1, 8, micro_num=5, rampup=Rampup(2, 2, 1))
    assert [plan.micro_num_at(b) for b in range(4)] == [2, 4, 5, 5]
    assert plan.sizes == (2, 4, 5)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.integers(0, 20))
def test_rampup_never_shrinks_and_arrives(start, increment, every, more):
    plan = BatchPlan(1, 4, micro_num=start + more, rampup=Rampup(start, increment, every))
    sizes = [plan.micro_num_at(b) for b in range(plan.rampup_steps + 2)]
    assert sizes == sorted(sizes) and sizes[-1] == plan.micro_num
    assert set(sizes) <= set(plan.sizes)
    assert all(size < plan.micro_num for size in sizes[: plan.rampup_steps])


def test_no_rampup_is_constant():
    plan = BatchPlan(1, 8, micro_num=3)
    assert (plan.micro_num_at(0), plan.rampup_steps, plan.rampup_samples, plan.sizes) == (3, 0, 0, (3,))


@pytest.mark.parametrize("text", ["", None, "  "])
def test_no_text_is_no_rampup(text):
    assert parse_rampup(text) is None


@pytest.mark.parametrize("text", ["2 2", "a b c", "1 2 3 4", "1.5 1 1", 7, "1 --2 3", "1 2 ²"])
def test_bad_rampup_says_what_to_write(text):
    with pytest.raises(LayoutError, match=r"data\.rampup_batch_size = .*write three integers"):
        parse_rampup(text)


@pytest.mark.parametrize(
    "rampup, pipe, message",
    [
        (Rampup(0, 1, 1), 1, "must be at least 1"),
        (Rampup(1, 0, 1), 1, "must be at least 1"),
        (Rampup(9, 1, 1), 1, "the start must be at most data.micro_num = 8"),
        (Rampup(2, 4, 1), 2, "the increment must divide data.micro_num - start = 6; possible here: 1, 2, 3, 6"),
    ],
)
def test_rampup_that_cannot_run(rampup, pipe, message):
    plan = BatchPlan(1, 8, micro_num=8, rampup=rampup)
    problems = plan.check(Layout(pipe=pipe), valid_micro_num=8, line_of={"data.rampup_batch_size": 5}.get)
    assert [(p.key, p.line) for p in problems] == [("data.rampup_batch_size", 5)]
    assert message in problems[0].message


def test_rampup_of_any_increment_runs_without_a_pipeline():
    plan = BatchPlan(1, 8, micro_num=8, rampup=Rampup(2, 4, 1))
    assert plan.check(Layout(), valid_micro_num=8, line_of=lambda key: None) == []


def test_chunks_need_multiples_of_the_pipeline():
    plan = BatchPlan(1, 8, micro_num=6, rampup=Rampup(2, 2, 1))
    problems = plan.check(Layout(pipe=4, chunks=2), valid_micro_num=3, line_of=lambda key: None)
    assert [p.key for p in problems] == ["data.micro_num", "data.valid_micro_num", "data.rampup_batch_size"]
    assert problems[0].message.endswith("nearest: 4 or 8") and problems[1].message.endswith("nearest: 4")
    assert "reaches 2 micro-batches" in problems[2].message
    assert plan.check(Layout(pipe=4), valid_micro_num=3, line_of=lambda key: None) == []
