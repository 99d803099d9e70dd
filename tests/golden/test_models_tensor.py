"""The reference's models split over 2 and 4 tensor ranks: logits, loss and gradients of the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import case_folders, golden, read_json
from deviations import is_post_norm_of_internlm1
from test_models import TOLERANCE, blueprint_of

from internlm_ds.arch import BLUEPRINTS
from internlm_ds.layout.ranks import Layout
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.model.loss import cross_entropy
from internlm_ds.parallel.collectives import gather_last_dim
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.shards import shard_of_parameter, take
from internlm_ds.testing.ranks import run_ranks

pytestmark = pytest.mark.timeout(120)
FOLDERS = case_folders("models", "summary.json")


def test_there_are_models_to_split():
    golden("models")
    assert FOLDERS, "the kind exists but holds no case"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_split_model_is_the_whole_model(folder, size: int):
    summary = read_json(folder / "summary.json")
    if summary["model_type"] not in BLUEPRINTS:
        pytest.skip(f"no model family {summary['model_type']} yet")
    if is_post_norm_of_internlm1(summary["model_type"], summary["model_kwargs"]):
        pytest.skip("deviation: refused")
    arch = blueprint_of(summary)[1]
    if arch.num_attention_heads % size or arch.num_kv_attention_heads % size or arch.mlp_hidden_size % size:
        pytest.skip(f"does not divide by {size}")
    run_ranks(_compare, Layout(tensor=size), folder, timeout_s=100)


def _compare(context, folder) -> None:
    for sequence_parallel in (False, True):
        _compare_mode(context.tensor, folder, sequence_parallel)


def _compare_mode(axis: Axis, folder, sequence_parallel: bool) -> None:
    summary, io = read_json(folder / "summary.json"), np.load(folder / "io.npz")
    config, arch = blueprint_of(summary)
    model = LanguageModel(
        build_layers(arch, config, tensor=axis, seed=None, dtype=torch.float64, sequence_parallel=sequence_parallel)
    )
    weights = torch.load(folder / "state_dict.pt", weights_only=True)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(take(weights[name], shard_of_parameter(parameter)))
    logits = model(torch.tensor(io["input_ids"]).view(-1), torch.tensor(io["cu_seqlens"]).view(-1).int())
    whole = gather_last_dim(logits, axis, length=arch.vocab_size) if config.parallel_output else logits
    _close(whole, io["logits_fp64"], "logits")
    loss = cross_entropy(
        logits,
        torch.tensor(io["labels"]).view(-1).long(),
        label_smoothing=summary["label_smoothing"],
        tensor=axis if config.parallel_output else None,
        vocab_size=arch.vocab_size,
    )
    _close(loss, summary["loss_fp64"], "loss")
    loss.backward()
    expected = torch.load(folder / "grads.pt", weights_only=True)
    for name, parameter in model.named_logical_parameters():
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(parameter.grad, group=axis.group)
        _close(parameter.grad, take(expected[name], shard_of_parameter(parameter)), f"gradient of {name}")


def _close(found: torch.Tensor, expected, what: str) -> None:
    expected = torch.as_tensor(expected).to(found.dtype).reshape(found.shape)
    torch.testing.assert_close(
        found.detach(), expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda message: f"{what}: {message}"
    )
