"""The training loss of one micro-batch, and what becomes of logits before it."""

from __future__ import annotations

from torch import Tensor

from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import mean_cross_entropy


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
