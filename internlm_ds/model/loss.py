"""The training loss of one micro-batch: of logits, or of a head that leaves its product to the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import IGNORED_LABEL, mean_cross_entropy
from internlm_ds.parallel.linear_cross_entropy import PendingLogits, TokenLosses, linear_cross_entropy


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    tensor: Axis | None = None,
    vocab_size: int | None = None,
) -> Tensor:
    """Mean cross entropy over the labels of one micro-batch that are not -100, computed in fp32.

    With label smoothing s: (1 - s)·nll + s·mean over the vocabulary of (-log p).

    Args:
        logits: `(…, V)`, or this rank's slice of the vocabulary.
        labels: int64 `(…)`, -100 where there is no target.
        label_smoothing: s.
        tensor: The axis the vocabulary is split over; one rank when None.
        vocab_size: V; needed where the axis has several ranks.
    Returns:
        Scalar; NaN when no label counts. A step is the mean of its micro-batches' values, not a token-weighted mean.
    """
    axis = tensor or Axis.single("tensor")
    flat = logits.reshape(-1, logits.shape[-1])
    return mean_cross_entropy(
        flat, labels.reshape(-1), tensor=axis, vocab_size=vocab_size, label_smoothing=label_smoothing
    )


def chunked_cross_entropy(
    pending: PendingLogits, labels: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, TokenLosses]:
    """The same mean of logits that are never whole, and what came of each token; see `linear_cross_entropy`.

    Args:
        pending: What the head returned.
        labels: int64, T of them; -100 where there is no target.
        label_smoothing: s.
    Returns:
        Scalar, NaN when no label counts (with gradients of 0); values of the tokens.
    """
    labels = labels.reshape(-1)
    tokens = linear_cross_entropy(pending, labels, label_smoothing=label_smoothing)
    count = (labels != IGNORED_LABEL).sum()
    return torch.where(count > 0, tokens.total / count.clamp(min=1), torch.nan), tokens
