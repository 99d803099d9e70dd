"""Cross entropy of logits whose vocabulary may be split over the tensor axis; per token, in fp32 at least.

Split logits are never gathered: ranks exchange three numbers a token. Slices of the vocabulary are
`layout.shards.bounds`'.

Legend: T tokens, V vocabulary, v this rank's part of it; z logits, p probabilities, s label smoothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional

from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.context import Axis

IGNORED_LABEL = -100


def mean_cross_entropy(
    logits: Tensor, labels: Tensor, *, tensor: Axis, vocab_size: int | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean over the labels that count of (1 - s)·(-log p(label)) + s·mean over the vocabulary of (-log p).

    Args:
        logits: `(T, v)`, this rank's slice of the vocabulary.
        labels: int64 `(T,)`; -100 does not count.
        tensor: The axis that the vocabulary is split over.
        vocab_size: V; needed where the axis has several ranks.
        label_smoothing: s.
    Returns:
        Scalar, fp32 (fp64 for fp64 logits), the same on all ranks; NaN when no label counts, as 0/0.
    """
    if tensor.size == 1:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing)
    assert vocab_size is not None, "a split vocabulary needs its whole size"
    counted = labels != IGNORED_LABEL
    losses = _SplitCrossEntropy.apply(logits, labels.masked_fill(~counted, 0), tensor, vocab_size, label_smoothing)
    return losses.masked_fill(~counted, 0).sum() / counted.sum()


class _SplitCrossEntropy(Function):
    """Loss of each token, `(T,)`: log(sum e^z) - z(target), smoothed with log(sum e^z) - mean(z).

    Its gradient with respect to z is p - (1 - s)·onehot(target) - s/V.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, tensor: Axis, vocab_size: int, smoothing: float) -> Tensor:
        own, elsewhere = own_targets(targets, logits, tensor, vocab_size)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tensor.group)
        shifted = wide - largest[:, None]
        at_target = shifted.gather(1, own[:, None])[:, 0].masked_fill(elsewhere, 0)
        total = shifted.sum(dim=-1)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(dim=-1), at_target, total))
        dist.all_reduce(sums, group=tensor.group)
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), own, elsewhere)
        ctx.smoothing, ctx.vocab_size, ctx.dtype = smoothing, vocab_size, logits.dtype
        log_sum = sums[0].log()
        nll = log_sum - sums[1]
        return (1 - smoothing) * nll + smoothing * (log_sum - sums[2] / vocab_size) if smoothing else nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        probabilities, own, elsewhere = ctx.saved_tensors
        gradient = probabilities - ctx.smoothing / ctx.vocab_size
        at_target = (~elsewhere).to(gradient.dtype) * (1 - ctx.smoothing)
        gradient.scatter_add_(1, own[:, None], -at_target[:, None])
        return gradient.mul_(grad[:, None]).to(ctx.dtype), None, None, None, None


def own_targets(targets: Tensor, logits: Tensor, tensor: Axis, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Columns of this rank's logits `(T, v)` that targets `(T,)` name, and where they name none (column 0 there)."""
    start, stop = bounds(vocab_size, size=tensor.size, rank=tensor.rank)
    assert logits.shape[-1] == stop - start, (
        f"logits {tuple(logits.shape)} are not tensor rank {tensor.rank}'s slice of a vocabulary of {vocab_size}"
    )
    elsewhere = (targets < start) | (targets >= stop)
    return (targets - start).masked_fill(elsewhere, 0), elsewhere
