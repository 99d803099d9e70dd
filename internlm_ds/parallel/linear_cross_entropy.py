"""The head's product and its cross entropy together, a few rows at a time: whole logits never exist.

Gradients are computed in the forward pass, while a chunk's logits are at hand: what comes from above is one number, by
which they are multiplied in the backward pass. So the matrix is multiplied three times, as without chunks; computing
logits again instead would be a fourth. Plain oracle: the head's logits and `cross_entropy`.

A chunk's logits are rounded to the model's dtype, as the head's are, and everything after is fp32 (fp64 for fp64).
Sums over chunks are kept so too. What half precision would lose: gradients of logits are not divided by the number of
labels before they are rounded, and for fp16 multiplied by 4: they are at most
4 then, their sums over a chunk stay far from the largest number, and a probability of 2e-8 still counts.

Legend: T tokens, R rows of a chunk, H hidden, V vocabulary, v this rank's part of it; z logits, p probabilities, s
label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from internlm_ds.layout.loss_chunks import rows_of_chunk
from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.collectives import every_rank
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import IGNORED_LABEL, own_targets

# what fp16 gradients of logits are multiplied by, see above
FP16_FACTOR = 4.0


@dataclass(frozen=True)
class PendingLogits:
    """Logits that a head has not computed: `hidden @ weightᵀ`.

    Attributes:
        hidden: `(T, H)`, all tokens, in the weight's dtype.
        weight: `(v, H)`, this rank's rows of the matrix as it is used; a result of autograd if need be.
        tensor: The axis that the vocabulary is split over.
        vocab_size: V.
    """

    hidden: Tensor
    weight: Tensor
    tensor: Axis
    vocab_size: int


class TokenLosses(NamedTuple):
    """What came of the rows.

    Attributes:
        total: Sum of the losses of the labels that count, `()`; the only one with a gradient.
        nll: -log p(label), `(T,)`; meaningless where the label does not count.
        likeliest: int64 `(T,)`, of equal logits the first.
    """

    total: Tensor
    nll: Tensor
    likeliest: Tensor


def linear_cross_entropy(pending: PendingLogits, labels: Tensor, *, label_smoothing: float = 0.0) -> TokenLosses:
    """Sum over the labels that count of (1 - s)·(-log p(label)) + s·mean over the vocabulary of (-log p).

    Args:
        pending: The head's input and matrix.
        labels: int64 `(T,)`; -100 does not count.
        label_smoothing: s.
    Returns:
        fp32 (fp64 for fp64), the same on all tensor ranks. Its backward pass may run once: it hands out the gradients
        that are there and keeps none.
    """
    wanted = torch.is_grad_enabled() and (pending.hidden.requires_grad or pending.weight.requires_grad)
    found = _LinearCrossEntropy.apply(pending.hidden, pending.weight, labels, pending, label_smoothing, wanted)
    return TokenLosses(*found)


class _LinearCrossEntropy(Function):
    """The sum, with gradients that were computed on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, pending: PendingLogits, smoothing: float, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        chunks = _Chunks(hidden, weight, pending.tensor, pending.vocab_size, smoothing, wanted)
        counted = labels != IGNORED_LABEL
        columns = (hidden, labels.masked_fill(~counted, 0), counted.to(chunks.wide))
        found = [chunks.add(*rows) for rows in zip(*(column.split(chunks.rows) for column in columns), strict=True)]
        losses, nll, likeliest = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.gradients, ctx.dtype = chunks.gradients(), weight.dtype
        ctx.mark_non_differentiable(nll, likeliest)
        return losses.sum(), nll, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of a chunked loss were handed out already"
        return *(gradient.mul_(grad).to(ctx.dtype) for gradient in gradients), None, None, None, None


class _Chunks:
    """The pass over the rows: fills the rows of the hidden's gradient and adds up the weight's."""

    def __init__(self, hidden: Tensor, weight: Tensor, tensor: Axis, vocab_size: int, smoothing: float, wanted: bool):
        self.weight, self.tensor, self.vocab_size, self.smoothing = weight, tensor, vocab_size, smoothing
        self.start, stop = bounds(vocab_size, size=tensor.size, rank=tensor.rank)
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.factor = FP16_FACTOR if weight.dtype == torch.float16 else 1.0
        self.rows = rows_of_chunk(len(weight), device=hidden.device.type)
        # one work area for all chunks: fresh pages would cost a processor as much as the arithmetic on them
        shape = (min(self.rows, len(hidden)), stop - self.start)
        self.work = hidden.new_empty(shape)
        self.work_wide = self.work if self.wide == weight.dtype else hidden.new_empty(shape, dtype=self.wide)
        self.done, self.wanted = 0, wanted
        if wanted:
            self.of_hidden = torch.empty_like(hidden, dtype=self.wide)
            self.of_weight = torch.empty_like(weight, dtype=self.wide)

    def add(self, hidden: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One chunk: loss, 0 where the label does not count, -log p and likeliest token of its rows."""
        logits = torch.mm(hidden, self.weight.t(), out=self.work[: len(hidden)])
        if self.work_wide is not self.work:
            logits = self.work_wide[: len(hidden)].copy_(logits)
        own, elsewhere = own_targets(targets, logits, self.tensor, self.vocab_size)
        at_target = logits.gather(1, own[:, None])[:, 0].masked_fill(elsewhere, 0)
        total = logits.sum(dim=-1) if self.smoothing else torch.zeros_like(at_target)
        largest, likeliest = logits.max(dim=-1)
        sums = logits.sub_(largest[:, None]).exp_().sum(dim=-1)
        log_sum = largest + sums.log()
        if self.tensor.size > 1:
            here = log_sum
            log_sum, at_target, total, likeliest = self._joined(here, at_target, total, largest, likeliest)
            sums = sums * (log_sum - here).exp()
        nll, s = log_sum - at_target, self.smoothing
        losses = (1 - s) * nll + s * (log_sum - total / self.vocab_size) if s else nll
        if self.wanted:
            self._differentiate(logits, hidden, own, counts / sums, counts.masked_fill(elsewhere, 0), counts)
        return losses.masked_fill(counts == 0, 0), nll, likeliest

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """Of hidden and weight, `(T, H)` and `(v, H)`; None where nobody wants them."""
        if not self.wanted:
            return None
        if self.factor != 1:
            self.of_hidden.div_(self.factor)
            self.of_weight.div_(self.factor)
        return self.of_hidden, self.of_weight

    def _joined(
        self, log_sum: Tensor, at_target: Tensor, total: Tensor, largest: Tensor, likeliest: Tensor
    ) -> tuple[Tensor, ...]:
        """The first three and the likeliest token over the whole vocabulary; one exchange of five numbers a row."""
        mine = torch.stack([x.double() for x in (log_sum, at_target, total, largest, likeliest + self.start)])
        log_sum, at_target, total, largest, place = every_rank(mine, self.tensor).unbind(dim=1)
        # of equal logits the first counts, as in one process
        winner = place.masked_fill(largest < largest.amax(dim=0), self.vocab_size).amin(dim=0)
        found = log_sum.logsumexp(dim=0), at_target.sum(dim=0), total.sum(dim=0)
        return *(x.to(self.wide) for x in found), winner.long()

    def _differentiate(
        self, exponentials: Tensor, hidden: Tensor, own: Tensor, inverse: Tensor, targeted: Tensor, counts: Tensor
    ) -> None:
        """Of logits, p - (1 - s)·onehot(target) - s/V times `factor` where the label counts; then of their factors."""
        s, factor = self.smoothing, self.factor
        gradient = exponentials.mul_((inverse * factor)[:, None])
        if s:
            gradient.sub_((counts * (factor * s / self.vocab_size))[:, None])
        gradient.scatter_add_(1, own[:, None], (targeted * (-factor * (1 - s)))[:, None])
        if self.work_wide is not self.work:
            gradient = self.work[: len(hidden)].copy_(gradient)
        first, rows = self.done == 0, self.of_hidden[self.done : self.done + len(hidden)]
        self.done += len(hidden)
        if self.work_wide is self.work:
            torch.mm(gradient, self.weight, out=rows)
            self.of_weight.addmm_(gradient.t(), hidden, beta=0 if first else 1)
            return
        rows.copy_(gradient @ self.weight)
        addend = gradient.t() @ hidden
        self.of_weight.copy_(addend) if first else self.of_weight.add_(addend)
