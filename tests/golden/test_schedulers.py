"""Learning rate, beta2 and loss scale against the reference."""

from __future__ import annotations

import pytest
from cases import entries

from internlm_ds.optim.loss_scale import DynamicLossScale
from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule

LR_TOLERANCE = {"rel": 1e-12, "abs": 1e-16}


def test_learning_rate_equals_the_reference():
    for case in entries("schedulers", "lr.json"):
        schedule = _lr_schedule(case)
        assert [schedule.at(t) for t in range(len(case["lr"]))] == pytest.approx(case["lr"], **LR_TOLERANCE)


def test_learning_rate_after_a_resume_is_the_uninterrupted_one():
    """Deviation ("Learning rate after a resume"): the reference is one step ahead in a warm-up, ours continues."""
    for case in entries("schedulers", "lr_resume_quirk.json"):
        schedule, before = _lr_schedule(case), case["steps_before"]
        ours = [schedule.at(before + t) for t in range(len(case["uninterrupted"]))]
        assert ours == pytest.approx(case["uninterrupted"], **LR_TOLERANCE)


def test_beta2_equals_the_reference():
    for case in entries("schedulers", "beta2.json"):
        schedule = Beta2Schedule(
            adam_beta2=case["init_beta2"], init_beta2=case["init_beta2"], c=case["c"], first=max(case["cur_iter"], 0)
        )
        for updates, (scheduled, in_optimizer) in enumerate(case["after_step"], start=1):
            assert schedule.at(updates) == scheduled == in_optimizer


def test_loss_scale_equals_the_reference():
    for case in entries("schedulers", "grad_scaler.json"):
        scaler = DynamicLossScale(**case["kwargs"])
        for index, (overflow, expected) in enumerate(zip(case["overflow"], case["after_update"], strict=True)):
            scaler.update(bool(overflow))
            assert [scaler.scale, scaler.growth_step, scaler.hysteresis_step] == expected, index


def _lr_schedule(case: dict) -> LrSchedule:
    kwargs = {key: value for key, value in case["kwargs"].items() if key != "last_epoch"}
    return LrSchedule(base_lr=case["base_lr"], **kwargs)
