"""Samples that are there twice: a doubled file, an interrupted second run, and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.data.doctor import kernel, repeats
from internlm_ds.data.doctor.repeats import Repeat, find_repeat

A, B, C = range(100, 150), range(200, 260), range(300, 330)


def found(*parts, **keywords):
    return find_repeat(np.array([value for part in parts for value in part], dtype=np.uint64), **keywords)


@pytest.mark.parametrize("kernels", [None, kernel])
@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((A, A), Repeat(50, 0, 2)),
        ((A, A, A), Repeat(50, 0, 3)),
        (([1, 2, 3], [1, 2, 3]), Repeat(3, 0, 2)),
        ((A, A[:30]), Repeat(50, 0, 1)),
        ((A, B, A), Repeat(110, 0, 1)),
        ((C, A, B, B), Repeat(140, 80, 1)),
        ((A, A, A[:30]), Repeat(50, 0, 2)),
    ],
)
def test_a_second_run_is_found(parts, expected, kernels):
    assert found(*parts, kernels=kernels) == expected


@pytest.mark.parametrize(
    "parts", [(), ([7],), ([7] * 100,), ([1, 2] * 50,), (A, A[:10]), (A, B, A[:19]), (A, B[:10], B[:10])]
)
def test_equal_samples_alone_are_none(parts):
    assert found(*parts) is None


@given(st.lists(st.integers(0, 2), max_size=12))
def test_the_two_functions_are_what_they_say(values):
    array = np.array(values, dtype=np.uint64)
    for module in (repeats, kernel):
        borders, matches = module.border_lengths(array).tolist(), module.prefix_matches(array).tolist()
        for place in range(len(values)):
            head = values[: place + 1]
            assert borders[place] == max(n for n in range(place + 1) if head[:n] == head[place + 1 - n :])
            if place:
                rest = values[place:]
                assert matches[place] == max(n for n in range(len(rest) + 1) if rest[:n] == values[:n])
