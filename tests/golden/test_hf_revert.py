"""Imports from Hugging Face against the reference's own scripts: every file of the result, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cases
import pytest
import torch
from deviations import drops_biases_of_queries, has_mlp_names_of_2023, names_the_embedding_as_if_split

from internlm_ds.arch.parts import mlp_width
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats import hf_config
from internlm_ds.convert.run import Request, convert
from internlm_ds.convert.sources import dict_of_model, model_of_dict

CASES = cases.case_folders("hf_revert", "args.json")
CLASSES = {"revert_internlm.py": "LlamaForCausalLM", "revert_internlm2.py": "InternLM2ForCausalLM"}
MODEL_TYPES = {"revert_internlm.py": "LLAMA2", "revert_internlm2.py": "INTERNLM2_PUBLIC"}
NEED_NOT_AGREE = {"mlp_ratio", "dtype", "no_bias"}
"""Other ratios give the same width; dtype is another spelling; `no_bias` where biases are kept."""

CONFIG = """
model_type = {kind!r}
ckpt = dict(enable_save_ckpt=False)
data = dict(seq_len=8, total_steps=2, train_folder=None)
hybrid_zero_optimizer = dict(reduce_bucket_size=1000, clip_grad_norm=1.0)
adam = dict(lr=1e-3, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=2)
beta2_scheduler = dict(init_beta2=0.95)
parallel = dict(zero1=-1)
model = {model}
"""


def test_hf_revert_exists():
    cases.golden("hf_revert")
    assert CASES, "the kind is there, but holds no case"


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_hf_revert_equals_reference(case: Path, tmp_path: Path):
    args, weights = cases.read_json(case / "args.json"), case / "hf/pytorch_model.bin"
    folder, given = tmp_path / "hf", unpickle.load(weights, lazy=True)
    shutil.copytree(case / "hf", folder)
    values = cases.read_json(case / "hf/config_values.json")
    keeps_biases = drops_biases_of_queries(given)
    bias = {"attention_bias": True} if keeps_biases else {}
    (folder / "config.json").write_text(
        json.dumps({"architectures": [CLASSES[args["script"]]], **values, **bias}), encoding="utf-8"
    )
    config = _config(tmp_path / "config.py", args, folder, keeps_biases=keeps_biases)
    request = Request(str(folder), str(tmp_path / "out"), "hf", "internlm", tensor=args["tp_size"], config=config)
    summary = convert(request)
    assert summary.logits_difference < 1e-4

    expected_files = {path.name for path in (case / "out").glob("model_*.pt")}
    assert {path.name for path in (tmp_path / "out").glob("model_*.pt")} == expected_files
    for name in expected_files - {"model_config.pt"}:
        expected, found = (unpickle.load(parent / name) for parent in (case / "out", tmp_path / "out"))
        if has_mlp_names_of_2023(args):
            expected = {_exchanged(key): tensor for key, tensor in expected.items()}
        if names_the_embedding_as_if_split(args):
            expected["tok_embeddings.word_embeddings.weight"] = expected.pop("tok_embeddings.weight")
        kept = {key: tensor for key, tensor in found.items() if not (keeps_biases and key.endswith(".bias"))}
        assert kept.keys() == expected.keys()
        for key, tensor in expected.items():
            assert kept[key].dtype == tensor.dtype and torch.equal(kept[key], tensor), key
    _compare_settings(case, tmp_path / "out")


def _config(path: Path, args: dict, folder: Path, *, keeps_biases: bool) -> Path:
    """The settings that the reference's options ask for, as a configuration."""
    found = hf_config.read(folder).model
    kind = MODEL_TYPES[args["script"]]
    model = {**dict_of_model(found, dtype=torch.float32, model_type=kind), "no_bias": not keeps_biases}
    model |= {"adapt_hf": args.get("adapt", True), "embed_split_hidden": args["embed_split"], "dtype": "torch.float32"}
    path.write_text(CONFIG.format(kind=kind, model=model), encoding="utf-8")
    return path


def _exchanged(name: str) -> str:
    swap = {"w2": "w3", "w3": "w2"}
    return ".".join(swap.get(word, word) for word in name.split("."))


def _compare_settings(case: Path, out: Path) -> None:
    expected, found = (unpickle.load(parent / "model_config.pt") for parent in (case / "out", out))
    for key, value in expected.items():
        if key not in NEED_NOT_AGREE and key in found:
            assert found[key] == value, key
    assert mlp_width(model_of_dict(found)) == mlp_width(model_of_dict(expected))
