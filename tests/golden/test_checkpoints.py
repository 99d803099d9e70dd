"""Checkpoint folders as the reference wrote them: every file opens, weights of every layout merge to the same."""

from __future__ import annotations

import re
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

from internlm_ds.arch import internlm as blueprint
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.manager import find_checkpoints
from internlm_ds.convert.sources import model_of_dict

LEARNED = 0.02
"""How far four updates at a rate of at most 1e-3 can carry a weight, rounded to bf16; misplaced ones differ by 0.1."""

CASES = cases.case_folders("checkpoints", "layout.json")


def test_checkpoints_exist():
    cases.golden("checkpoints")
    assert CASES, "the kind is there, but holds no case"


@pytest.fixture(params=CASES, ids=lambda path: path.name)
def case(request) -> Path:
    return request.param


def described(case: Path) -> dict:
    return cases.read_json(case / "layout.json")


def v1_model(case: Path):
    layout = described(case)
    if layout["model_type"] != "INTERNLM":
        pytest.skip(f"{layout['model_type']} does not exist in this version")
    if any(internlm.OTHER_SPLIT.fullmatch(path.name) for path in case.rglob("*.pt")):
        pytest.skip("weights split over other ranks (isp) are not read in this version")
    return model_of_dict(layout["model_kwargs"])


def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The formula of the kind's README."""
    offset = sum(ord(c) * (i + 1) for i, c in enumerate(name)) % 997
    values = np.sin(np.arange(int(np.prod(shape))) * 0.37 + offset) * 0.1 + ("norm" in name)
    return torch.from_numpy(values.reshape(shape)).float()


def test_checkpoints_weights_merge(case):
    arch = blueprint.build(v1_model(case))
    folders = [found.path for found in find_checkpoints(case / "ckpt")]
    assert folders
    for folder in folders:
        weights = internlm.read_weights(folder, arch=arch)
        assert set(weights) == {spec.name for spec in arch.iter_params()}
        for spec in arch.iter_params():
            weight = weights[spec.name]
            assert weight.dtype == torch.bfloat16
            torch.testing.assert_close(
                weight.float(), initial(spec.name, spec.shape), rtol=0, atol=LEARNED, msg=spec.name
            )


def test_checkpoints_latest_is_found(case):
    latest = described(case)["latest"]["path"].removeprefix("local:")
    assert find_checkpoints(case / "ckpt")[0].path == case / latest


def test_checkpoints_files_open_as_described(case):
    for name, entry in described(case)["files"].items():
        if not (case / name).exists():
            continue
        value = unpickle.load(case / name)
        kind = entry["type"].rpartition(".")[2]
        assert type(value).__name__ == {"OrderedDict": "dict", "Config": "dict"}.get(kind, kind), name
        assert_described(value, entry["content"], where=name)


def assert_described(value, content, *, where: str) -> None:
    """Compare a value with its description: `tensor DTYPE [SHAPE]`, `list of N`, plain values as they are."""
    if isinstance(content, dict) and isinstance(value, dict):
        assert {str(key) for key in value} == set(content), where
        for key, item in value.items():
            assert_described(item, content[str(key)], where=f"{where}: {key}")
    elif isinstance(content, str) and (match := re.fullmatch(r"tensor (\w+) \[(.*)\]", content)):
        assert str(value.dtype) == f"torch.{match[1]}", where
        assert list(value.shape) == [int(size) for size in match[2].split(",") if size.strip()], where
    elif isinstance(value, torch.dtype):
        assert content == str(value), where
    elif isinstance(content, (bool, int, float)) and isinstance(value, (bool, int, float)):
        assert value == content, where


def test_checkpoints_settings_are_read(case):
    kwargs = described(case)["model_kwargs"]
    for found in find_checkpoints(case / "ckpt"):
        stored = internlm.read_model_config(found.path)
        assert {key: str(value) for key, value in stored.items()} == {key: str(value) for key, value in kwargs.items()}
