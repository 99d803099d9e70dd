"""Loss and gradients in chunks of rows against whole logits: dtypes, smoothing, labels that do not count, extremes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm_ds.model.loss import chunked_cross_entropy, cross_entropy
from internlm_ds.model.metrics import TokenMetrics, token_values
from internlm_ds.parallel import linear_cross_entropy as chunked
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear_cross_entropy import PendingLogits, linear_cross_entropy

T, H, V = 30, 16, 53
ONE = Axis.single("tensor")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seven_rows(monkeypatch):
    monkeypatch.setattr(chunked, "rows_of_chunk", lambda width, *, device: 7)


def inputs(dtype: torch.dtype = torch.float32, *, scale: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * scale).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[::5] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, *, smoothing: float = 0.0, factor: float = 1.0):
    loss = cross_entropy(hidden @ weight.t(), labels, label_smoothing=smoothing)
    return loss.detach(), torch.autograd.grad(loss * factor, (hidden, weight))


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, *, smoothing: float = 0.0, factor: float = 1.0):
    loss, _ = chunked_cross_entropy(PendingLogits(hidden, weight, ONE, V), labels, label_smoothing=smoothing)
    return loss.detach(), torch.autograd.grad(loss * factor, (hidden, weight))


def assert_same(found, expected, dtype: torch.dtype) -> None:
    assert found[0].dtype == expected[0].dtype
    torch.testing.assert_close(found[0], expected[0], rtol=min(TOLERANCE[dtype], 1e-6), atol=0)
    for gradient, other in zip(found[1], expected[1], strict=True):
        assert gradient.dtype == dtype
        largest = other.abs().max().item()
        torch.testing.assert_close(gradient, other, rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_whole_logits(dtype, smoothing):
    """With the factors of micro-batches and loss scale behind it."""
    args = inputs(dtype)
    factor = 2.0**12 / 4 if dtype == torch.float16 else 0.25
    expected = plain(*args, smoothing=smoothing, factor=factor)
    assert_same(in_chunks(*args, smoothing=smoothing, factor=factor), expected, dtype)


def test_fp16_gradients_at_a_loss_scale_equal_those_of_fp32():
    hidden, weight, labels = inputs(torch.float16)
    wide = plain(hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), labels)
    scale = 2.0**14
    for gradient, other in zip(in_chunks(hidden, weight, labels, factor=scale)[1], wide[1], strict=True):
        torch.testing.assert_close(gradient.float() / scale, other, rtol=0, atol=2e-3 * other.abs().max().item())


def test_an_overflow_of_the_loss_scale_is_seen():
    args = inputs(torch.float16)
    assert all(not gradient.isfinite().all() for gradient in in_chunks(*args, factor=2.0**24)[1])


def test_large_logits():
    args = inputs(scale=300.0)
    assert_same(in_chunks(*args), plain(*args), torch.float32)


def test_nan_is_seen():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    loss, gradients = in_chunks(hidden, weight, labels)
    assert loss.isnan() and gradients[1].isnan().any()


def test_metrics_come_from_the_same_pass():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        weight[40] = weight[11]  # of equal logits the first counts
        labels[1] = (hidden[1] @ weight.t()).argmax()
    types = torch.arange(T) % 2
    expected, found = TokenMetrics(("en", "cn")), TokenMetrics(("en", "cn"))
    expected.update(hidden @ weight.t(), labels, types)
    _, tokens = chunked_cross_entropy(PendingLogits(hidden, weight, ONE, V), labels)
    assert torch.equal(tokens.likeliest, (hidden @ weight.t()).argmax(-1))
    found.update_from(tokens, labels, types)
    torch.testing.assert_close(found.totals, expected.totals, rtol=1e-6, atol=0)
    assert token_values(hidden @ weight.t(), labels)[1, 0] == 1


def test_no_label_counts():
    hidden, weight, labels = inputs()
    loss, gradients = in_chunks(hidden, weight, torch.full_like(labels, -100))
    assert loss.isnan() and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_without_gradients_none_are_made():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        tokens = linear_cross_entropy(PendingLogits(hidden, weight, ONE, V), labels)
    assert tokens.total.grad_fn is None
    torch.testing.assert_close(tokens.total / (labels != -100).sum(), plain(hidden, weight, labels)[0])


def test_gradients_are_handed_out_once():
    hidden, weight, labels = inputs()
    loss, _ = chunked_cross_entropy(PendingLogits(hidden, weight, ONE, V), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="handed out already"):
        loss.backward()


def test_rows_of_a_chunk_change_the_order_of_sums_only(monkeypatch):
    args = inputs(torch.float64)
    expected = in_chunks(*args, smoothing=0.1)
    for rows in (1, T, T + 1):
        monkeypatch.setattr(chunked, "rows_of_chunk", lambda width, *, device, rows=rows: rows)
        assert_same(in_chunks(*args, smoothing=0.1), expected, torch.float64)
