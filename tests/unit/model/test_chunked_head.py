"""A head that leaves its product to the loss: when it does, and that the last stage's numbers stay the same."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from internlm_ds.arch import internlm2
from internlm_ds.config.schema import ModelConfig
from internlm_ds.layout import loss_chunks
from internlm_ds.model.layers import build_layers, build_modules
from internlm_ds.parallel.context import Axis, ParallelContext
from internlm_ds.parallel.linear_cross_entropy import PendingLogits
from internlm_ds.train.metrics import StageLoss

TINY = ModelConfig(num_layers=1, hidden_size=16, vocab_size=47, num_attention_heads=2, mlp_ratio=2)
BORDERS = torch.tensor([0, 20], dtype=torch.int32)
LABELS = torch.arange(20) % 11
LABELS[::4] = -100
TYPES = torch.arange(20) % 2


def head(chunked_loss, dtype: torch.dtype = torch.float32, **switches):
    config = replace(TINY, **switches)
    entries = build_layers(
        internlm2.build(config),
        config,
        tensor=Axis.single("tensor"),
        seed=3,
        dtype=dtype,
        chunked_loss=chunked_loss,
    )
    return build_modules(entries[-1:])[0]


def hidden() -> torch.Tensor:
    return torch.randn(20, 16, generator=torch.Generator().manual_seed(1)) * 3


def stage_loss() -> StageLoss:
    return StageLoss(label_smoothing=0.1, dataset_types=("en", "cn"), context=ParallelContext.single(), vocab_size=47)


def last_stage(chunked_loss, labels: torch.Tensor = LABELS, **switches):
    """Loss, gradients of input and matrix, and metrics of what the last stage does."""
    module, x, loss_fn = head(chunked_loss, **switches), hidden().requires_grad_(), stage_loss()
    loss = loss_fn(module((x, BORDERS)), (labels, TYPES))
    (loss / 4).backward()
    return loss.detach(), (x.grad, module.weight.grad), loss_fn.finish_step()


@pytest.mark.parametrize(
    "switches", [{}, {"norm_head": True}, {"embed_grad_scale": 0.1}, {"norm_head": True, "embed_grad_scale": 0.1}]
)
def test_loss_gradients_and_metrics_stay(switches):
    expected, found = last_stage(False, **switches), last_stage(True, **switches)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for gradient, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-6 * other.abs().max().item())
    assert found[2] == expected[2]


def test_a_micro_batch_without_targets_counts_nothing():
    loss, gradients, metrics = last_stage(True, torch.full_like(LABELS, -100))
    assert loss.item() == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    assert math.isnan(metrics["acc"])


def test_evaluation_counts_apart_and_is_nan_without_targets():
    module, loss_fn = head(True).eval(), stage_loss()
    with torch.no_grad(), loss_fn.validating() as finish:
        pending = module((hidden(), BORDERS))
        first = loss_fn(pending, (LABELS, TYPES))
        assert loss_fn(pending, (torch.full_like(LABELS, -100), TYPES)).isnan()
        assert math.isclose(finish()["loss_from_metric"], loss_of_targets(module), abs_tol=1e-4)
    assert first.isfinite() and math.isnan(loss_fn.finish_step()["acc"])


def loss_of_targets(module) -> float:
    logits = hidden() @ module.weight.detach().t()
    return torch.nn.functional.cross_entropy(logits, LABELS).item()


def test_many_logits_are_left_to_the_loss(monkeypatch):
    module, small = head("auto"), (hidden(), BORDERS)
    assert isinstance(module(small), torch.Tensor)
    monkeypatch.setattr(loss_chunks, "CHUNKED_FROM", 20 * 47)
    pending = module(small)
    assert isinstance(pending, PendingLogits) and pending.vocab_size == 47
    assert torch.equal(pending.hidden @ pending.weight.t(), head(False)(small))
    assert isinstance(module((hidden()[1:], BORDERS)), torch.Tensor)


def test_who_does_not_ask_gets_logits():
    config = TINY
    entries = build_layers(internlm2.build(config), config, tensor=Axis.single("tensor"), seed=3, dtype=torch.bfloat16)
    assert build_modules(entries[-1:])[0]((hidden(), BORDERS)).dtype == torch.bfloat16


def test_the_input_is_cast_to_the_matrix():
    pending = head(True, torch.bfloat16)((hidden(), BORDERS))
    assert pending.hidden.dtype == pending.weight.dtype == torch.bfloat16
