"""Names, shapes and spread of the reference's freshly built models."""

from math import prod, sqrt

import pytest
from cases import entries, golden_root, read_json
from test_models import blueprint_of

from internlm_ds.model.init import initial_value

LIST = "init_stats.json"
STD_TOLERANCE = 0.02


def cases():
    path = golden_root() / "init" / LIST
    return range(len(read_json(path))) if path.exists() else []


def test_there_are_initial_values():
    entries("init", LIST)


@pytest.mark.parametrize("index", cases())
def test_initial_values(index):
    case = entries("init", LIST)[index]
    _, arch = blueprint_of(case)
    specs = {spec.name: spec for spec in arch.iter_params()}
    assert {name: tuple(spec.shape) for name, spec in specs.items()} == {
        name: tuple(stats["shape"]) for name, stats in case["params"].items()
    }
    for name, stats in case["params"].items():
        value = initial_value(specs[name], 1024).double()
        mean, std = value.mean().item(), value.std(correction=0).item()
        if stats["std"] == 0:
            assert (mean, std) == (stats["mean"], 0), name
            continue
        # both are samples: their spread around the true value shrinks with the number of elements
        noise = 5 / sqrt(prod(stats["shape"]))
        assert std == pytest.approx(stats["std"], rel=max(STD_TOLERANCE, noise)), name
        assert abs(mean - stats["mean"]) < 2 * noise * stats["std"] + 1e-6, name
