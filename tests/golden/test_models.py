"""Logits, loss and gradients of the reference's models, packed and in evaluation."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from cases import case_folders, golden, read_json
from deviations import is_post_norm_of_internlm1

from internlm_ds.arch import BLUEPRINTS, blueprint
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import ConfigError
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.context import Axis

FOLDERS = case_folders("models", "summary.json")
TOLERANCE = 1e-4


def blueprint_of(summary):
    """The model's configuration and blueprint; skips families that do not exist yet."""
    if summary["model_type"] not in BLUEPRINTS:
        pytest.skip(f"no model family {summary['model_type']} yet")
    known = {field.name for field in fields(ModelConfig)}
    keywords = {k: v for k, v in summary["model_kwargs"].items() if k in known and k not in ("dtype", "extra")}
    config = ModelConfig(**keywords)
    return config, blueprint(summary["model_type"], config)


def load(folder, dtype):
    config, arch = blueprint_of(read_json(folder / "summary.json"))
    model = LanguageModel(build_layers(arch, config, tensor=Axis.single("tensor"), seed=None, dtype=dtype))
    weights = torch.load(folder / "state_dict.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(weights.pop(name))
    assert not weights, f"parameters that the model lacks: {sorted(weights)}"
    return model


def close(found, expected):
    expected = torch.as_tensor(expected).to(found.dtype).reshape(found.shape)
    torch.testing.assert_close(found.detach(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_there_are_models():
    golden("models")
    assert FOLDERS, "the kind exists but holds no case"


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    summary = read_json(request.param / "summary.json")
    if is_post_norm_of_internlm1(summary["model_type"], summary["model_kwargs"]):
        with pytest.raises(ConfigError, match="apply_post_layer_norm"):
            load(request.param, torch.float32)
        pytest.skip("deviation: refused")
    return request.param


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "logits"), (torch.float64, "logits_fp64")])
def test_packed_logits(folder, dtype, key):
    model, io = load(folder, dtype), np.load(folder / "io.npz")
    close(model(torch.tensor(io["input_ids"]).view(-1), torch.tensor(io["cu_seqlens"]).view(-1).int()), io[key])


@pytest.mark.parametrize(("dtype", "key"), [(torch.float32, "loss"), (torch.float64, "loss_fp64")])
def test_loss_and_gradients(folder, dtype, key):
    model, io, summary = load(folder, dtype), np.load(folder / "io.npz"), read_json(folder / "summary.json")
    logits = model(torch.tensor(io["input_ids"]).view(-1), torch.tensor(io["cu_seqlens"]).view(-1).int())
    loss = cross_entropy(logits, torch.tensor(io["labels"]).view(-1).long(), label_smoothing=summary["label_smoothing"])
    close(loss, summary[key])
    loss.backward()
    expected = torch.load(folder / "grads.pt", weights_only=True)
    found = {name: parameter.grad for name, parameter in model.named_logical_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name])
        close(gradient.norm(), summary["grad_norms"][name])


def test_evaluation_logits(folder):
    model, io = load(folder, torch.float32).eval(), np.load(folder / "io.npz")
    tokens = torch.tensor(io["eval_input_ids"])
    borders = torch.arange(0, tokens.numel() + 1, tokens.shape[1], dtype=torch.int32)
    close(model(tokens.view(-1), borders), io["eval_logits"])
