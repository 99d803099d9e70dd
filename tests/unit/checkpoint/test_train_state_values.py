"""Values return from strict JSON as they were."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.checkpoint import train_state

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.just("$tuple"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_return_as_they_were(value):
    text = train_state.dumps(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    back = train_state.loads(text)
    assert back == value and type(back) is type(value)


def test_nan_and_signed_zero_return():
    back = train_state.loads(train_state.dumps([math.nan, -0.0, -math.inf]))
    assert math.isnan(back[0]) and math.copysign(1, back[1]) == -1 and back[2] == -math.inf


def test_random_states_return():
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    tensors: dict[str, torch.Tensor] = {}
    back = train_state.loads(train_state.dumps(states, tensors), tensors)
    assert back["python"] == states["python"]
    assert back["numpy"][1].dtype == np.uint32 and (back["numpy"][1] == states["numpy"][1]).all()
    assert back["numpy"][2:] == states["numpy"][2:]
    assert torch.equal(back["torch"], states["torch"])


def test_what_would_need_pickle_is_refused():
    with pytest.raises(TypeError, match="object at /a cannot be written without pickle"):
        train_state.dumps({"a": object()})
    with pytest.raises(TypeError, match="a tensor at /a has no place in this file"):
        train_state.dumps({"a": torch.zeros(2)})
