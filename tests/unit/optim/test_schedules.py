"""Learning rate and beta2 at their corners; the golden tests hold the curves."""

from __future__ import annotations

import math

import pytest

from internlm_ds.optim.schedules import Beta2Schedule, LrSchedule, beta2, learning_rate


def test_the_tutorial_logs_these_rates():
    """The log shows the rate of the next update."""
    schedule = LrSchedule(base_lr=1e-4, total_steps=50000, warmup_ratio=0.01, eta_min=1e-5)
    logged = [schedule.at(updates) for updates in (1, 2, 3, 4, 5, 6)]
    assert logged == [
        4.0000000000000003e-07,
        6.000000000000001e-07,
        8.000000000000001e-07,
        1.0000000000000002e-06,
        1.2000000000000002e-06,
        1.4000000000000001e-06,
    ]


def test_base_rate_is_met_twice_and_the_minimum_at_the_end():
    kwargs = {"base_lr": 1.0, "total_steps": 20, "init_steps": 2, "warmup_ratio": 0.2, "eta_min": 0.1}
    assert [learning_rate(t, **kwargs) for t in (0, 1, 5, 6)] == [0.0, 0.0, 1.0, 1.0]
    assert learning_rate(20, **kwargs) == pytest.approx(0.1)
    assert learning_rate(25, **kwargs) > 0.1


def test_initial_steps_without_warm_up_rise_to_the_minimum():
    schedule = LrSchedule(base_lr=1.0, total_steps=20, init_steps=4, eta_min=0.1)
    rates = [schedule.at(t) for t in range(21)]
    assert rates[:5] == [0.0] * 5 and rates == sorted(rates) and rates[20] == pytest.approx(0.1)
    assert "never reaches adam.lr = 1.0; set lr_scheduler.warmup_ratio > 0" in schedule.warnings[0]
    assert LrSchedule(base_lr=1.0, total_steps=20, init_steps=4, warmup_ratio=0.1).warnings == ()


def test_no_room_for_a_cosine():
    assert learning_rate(10, base_lr=1.0, total_steps=10, warmup_ratio=1.0, eta_min=0.2) == 0.2
    assert learning_rate(9, base_lr=1.0, total_steps=10, warmup_ratio=1.0, eta_min=0.2) == 1.0


def test_beta2_before_the_first_update():
    assert beta2(0, init_beta2=0.9, c=0.8) == 0.9
    schedule = Beta2Schedule(adam_beta2=0.999, init_beta2=0.9, c=0.8)
    assert (schedule.at(0), schedule.at(1)) == (0.999, 0.9)


def test_beta2_rises_with_the_updates():
    assert beta2(1000, init_beta2=0.9, c=0.5) == pytest.approx(1 - 1 / math.sqrt(1000))
    assert beta2(1000, init_beta2=0.9, c=0) == 0.9
    assert beta2(1000, init_beta2=0.9, c=-1) == 0.9


def test_beta2_counts_from_cur_iter():
    assert Beta2Schedule(0.9, 0.9, c=0.5, first=100).at(5) == beta2(105, init_beta2=0.9, c=0.5)
