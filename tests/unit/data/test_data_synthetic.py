"""Dummy data: cheap to have, made when read, fit for any vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from internlm_ds.data.samples import lengths_of
from internlm_ds.data.synthetic import SyntheticSamples


def _obvious(num: int, max_len: int, fixed: bool) -> list[list[int]]:
    rng = np.random.RandomState(1999)
    tops, repeats = rng.randint(1, 30, size=num).tolist(), rng.randint(10, 200, size=num).tolist()
    samples = []
    for top, repeat in zip(tops, repeats):
        while fixed and top * repeat < max_len:
            repeat *= 2
        samples.append(([top, repeat] + list(range(top)) * repeat)[:max_len])
    return samples


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("max_len", [1, 2, 3, 40, 3000])
def test_samples_equal_the_obvious_ones(max_len: int, fixed: bool) -> None:
    samples = SyntheticSamples(40, max_len=max_len, fixed_seqlen=fixed)
    wanted = _obvious(40, max_len, fixed)
    assert [samples.read(number).tolist() for number in range(40)] == wanted
    assert lengths_of(samples.ends).tolist() == [len(sample) for sample in wanted]
    order = np.arange(40)[::-1]
    assert [samples.take(order).read(number).tolist() for number in range(40)] == wanted[::-1]


def test_ids_fit_a_small_vocabulary() -> None:
    samples = SyntheticSamples(30, max_len=50, vocab_size=16)
    assert max(int(samples.read(number).max()) for number in range(30)) < 16


def test_a_million_samples_are_three_arrays() -> None:
    samples = SyntheticSamples(1_000_000, max_len=2048)
    assert sum(value.nbytes for value in vars(samples).values() if isinstance(value, np.ndarray)) == 16_000_000
