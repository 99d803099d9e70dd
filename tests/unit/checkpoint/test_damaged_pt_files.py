"""One byte of a `.pt` file flipped, or the file cut, anywhere: an error that names it, or the very same values."""

from __future__ import annotations

import collections
import random

import pytest
import torch

from internlm_ds.checkpoint import unpickle
from internlm_ds.errors import CheckpointError


def same(a, b) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("places", [60, pytest.param(1500, marks=pytest.mark.soak)])
def test_damage_is_an_error_that_names_the_file(tmp_path, places):
    state = collections.OrderedDict(
        weight=torch.arange(24.0).reshape(4, 6),
        part=torch.arange(10, dtype=torch.bfloat16)[2:7],
        step=7,
        groups=[{"lr": 1e-3, "name": "fp32", "dtype": torch.float32}],
    )
    torch.save(state, tmp_path / "good.pt")
    good, path = (tmp_path / "good.pt").read_bytes(), tmp_path / "model_tp0_pp0.pt"
    expected, chance = unpickle.load(tmp_path / "good.pt"), random.Random(places)
    unnoticed = 0
    for _ in range(places):
        position = chance.randrange(len(good))
        flipped = bytearray(good)
        flipped[position] ^= 1 << chance.randrange(8)
        for bad in (bytes(flipped), good[:position]):
            path.write_bytes(bad)
            try:
                unpickle.check(path)
                found = unpickle.load(path)
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                unnoticed += 1
                assert same(found, expected), position
    assert unnoticed < places, "a zip file has bytes that mean nothing, but not so many"
