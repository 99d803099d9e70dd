"""Cross entropy of logits whose vocabulary may be split over the tensor axis; per token, in fp32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from internlm_ds.parallel.collectives import require_single
from internlm_ds.parallel.context import Axis

IGNORED_LABEL = -100


def mean_cross_entropy(logits: Tensor, labels: Tensor, *, tensor: Axis, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the labels that count of (1 - s)·(-log p(label)) + s·mean over the vocabulary of (-log p).

    Args:
        logits: `(T, v)`, this rank's slice of the vocabulary.
        labels: int64 `(T,)`; -100 does not count.
        label_smoothing: s.
    Returns:
        Scalar, fp32 (fp64 for fp64 logits); NaN when no label counts, as 0/0.
    """
    require_single(tensor)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing)
