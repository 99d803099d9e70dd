"""The loss of one micro-batch: mean over targets, label smoothing, fp32, NaN without targets."""

import pytest
import torch

from internlm_ds.model.loss import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_formula(smoothing):
    logits = torch.randn(6, 11, dtype=torch.float64)
    labels = torch.tensor([3, -100, 0, 10, -100, 5])
    log_p = logits.log_softmax(-1)
    counted = [i for i in range(6) if labels[i] != -100]
    nll = sum(-log_p[i, labels[i]] for i in counted) / 4
    uniform = sum(-log_p[i].mean() for i in counted) / 4
    expected = (1 - smoothing) * nll + smoothing * uniform
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=smoothing), expected)


def test_rows_are_flattened():
    logits, labels = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    torch.testing.assert_close(cross_entropy(logits, labels), cross_entropy(logits.view(6, 7), labels.view(6)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_give_an_fp32_loss(dtype):
    logits = torch.randn(5, 7).to(dtype)
    loss = cross_entropy(logits, torch.arange(5))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cross_entropy(logits.float(), torch.arange(5)))


def test_no_target_is_nan():
    assert cross_entropy(torch.randn(2, 5), torch.full((2,), -100)).isnan()
