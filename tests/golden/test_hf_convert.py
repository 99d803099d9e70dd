"""Hugging Face exports against the reference's own converter, tensor by tensor."""

from __future__ import annotations

import json

import cases
import pytest
import torch
from safetensors.torch import load_file

from internlm_ds.arch import BLUEPRINTS
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats.qkv import Heads
from internlm_ds.convert.run import Request, convert

FILES = "_hf_state_dict.pt"
NAMES = {"bias": "attention_bias"}
OTHER_ANSWERS = {"rotary", "max_position_embeddings"}
"""`rotary` is of the reference's own class; `max_position_embeddings` an option of its script, ours is the model's."""


def names() -> list[str]:
    root = cases.golden_root() / "hf_convert"
    return sorted(path.name.removesuffix(FILES) for path in root.glob(f"*{FILES}")) if root.is_dir() else []


def test_hf_convert_exists():
    cases.golden("hf_convert")
    assert names(), "the kind is there, but holds no case"


@pytest.mark.parametrize("name", names())
def test_hf_convert_weights_and_config(name, tmp_path):
    source = cases.golden("checkpoints") / name
    family = cases.read_json(source / "layout.json")["model_type"]
    if family not in BLUEPRINTS:
        pytest.skip(f"{family} does not exist in this version")
    folder = cases.golden("hf_convert")
    convert(Request(str(source / "ckpt/3"), str(tmp_path / "hf"), source_format="internlm", target_format="hf"))
    expected, found = unpickle.load(folder / f"{name}{FILES}"), load_file(tmp_path / "hf/model.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    config = json.loads((tmp_path / "hf/config.json").read_text())
    for key, value in cases.read_json(folder / f"{name}_config.json").items():
        if key not in OTHER_ANSWERS:
            assert config[NAMES.get(key, key)] == value, key


def test_hf_convert_order_of_wqkv_rows():
    path = cases.golden("hf_convert") / "wqkv_permute.json"
    if not path.exists():
        pytest.skip("no wqkv_permute.json among the golden data")
    case = cases.read_json(path)
    queries = case["num_heads"] // case["num_kv_heads"]
    heads = Heads(case["head_dim"], size=queries + 2, rotated=queries + 1)
    rows = torch.arange(len(case["row_order"]))
    assert heads.to_halves(rows).tolist() == case["row_order"]
    assert torch.equal(heads.to_neighbours(heads.to_halves(rows)), rows)
