"""The loss scale's bounds, its arguments and its state; the golden tests hold its curve."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.config.schema import Fp16Config, GradScalerConfig
from internlm_ds.errors import CheckpointError, ConfigError
from internlm_ds.optim.loss_scale import DynamicLossScale


def test_overflows_after_the_first_back_off_at_once_until_the_scale_grows():
    scaler = DynamicLossScale(initial_scale=16.0, growth_interval=3, hysteresis=2)
    scales = []
    for overflow in (1, 1, 1, 0, 0, 0, 1, 1):
        scaler.update(bool(overflow))
        scales.append(scaler.scale)
    assert scales == [16.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 4.0]


def test_upper_bound_without_lower_bound():
    scaler = DynamicLossScale(initial_scale=4.0, min_scale=None, max_scale=6.0, growth_interval=1, hysteresis=1)
    scaler.update(False)
    assert scaler.scale == 6.0
    scaler.update(True)
    assert scaler.scale == 3.0


def test_nought_means_no_bound():
    scaler = DynamicLossScale(initial_scale=1.0, min_scale=0, max_scale=0, growth_interval=1, hysteresis=0)
    scaler.update(True)
    assert scaler.scale == 0.5


@given(st.lists(st.booleans(), max_size=400), st.floats(1e-30, 1e30))
def test_scale_stays_a_positive_number(overflows, initial):
    scaler = DynamicLossScale(
        initial_scale=initial, growth_factor=16.0, backoff_factor=0.05, growth_interval=1, hysteresis=1
    )
    for overflow in overflows:
        scaler.update(overflow)
        assert math.isfinite(scaler.scale) and scaler.scale > 0


@given(st.lists(st.booleans(), max_size=40), st.lists(st.booleans(), max_size=40))
def test_state_continues_exactly(before, after):
    whole = DynamicLossScale(growth_interval=3)
    for overflow in before:
        whole.update(overflow)
    resumed = DynamicLossScale(growth_interval=3)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for overflow in after:
        whole.update(overflow)
        resumed.update(overflow)
    assert resumed.state_dict() == whole.state_dict()


def test_all_bad_arguments_are_listed():
    with pytest.raises(ConfigError) as caught:
        DynamicLossScale(initial_scale=0, growth_factor=1, backoff_factor=1, growth_interval=0, hysteresis=-1)
    text = str(caught.value)
    assert text.startswith("5 problems")
    for words in (
        "grad_scaler.fp16.initial_scale = 0: must be a finite number above 0",
        "grad_scaler.growth_factor = 1: must be above 1",
        "grad_scaler.backoff_factor = 1: must lie between 0 and 1",
        "grad_scaler.fp16.growth_interval = 0: must be at least 1 step",
        "grad_scaler.hysteresis = -1: must be 0 or more",
    ):
        assert words in text


@pytest.mark.parametrize(
    "bounds, words",
    [
        ({"min_scale": -1}, "grad_scaler.fp16.min_scale = -1: must be a finite number above 0, or None"),
        ({"max_scale": math.inf}, "grad_scaler.max_scale = inf: must be a finite number above 0, or None"),
        ({"min_scale": 8, "max_scale": 4}, "grad_scaler.max_scale = 4: must not be below fp16.min_scale = 8"),
    ],
)
def test_bad_bounds(bounds, words):
    with pytest.raises(ConfigError) as caught:
        DynamicLossScale(**bounds)
    assert words in str(caught.value)


def test_bad_state():
    scaler = DynamicLossScale()
    with pytest.raises(CheckpointError, match="state of the loss scale lacks growth_step, hysteresis_step"):
        scaler.load_state_dict({"scale": 1.0})
    with pytest.raises(CheckpointError, match="must be a positive number"):
        scaler.load_state_dict({"scale": math.nan, "growth_step": 0, "hysteresis_step": 0})


def test_from_config():
    config = GradScalerConfig(fp16=Fp16Config(initial_scale=8.0, growth_interval=7), max_scale=64.0, hysteresis=3)
    scaler = DynamicLossScale.from_config(config)
    assert (scaler.scale, scaler.growth_interval, scaler.max_scale, scaler.hysteresis) == (8.0, 7, 64.0, 3)
