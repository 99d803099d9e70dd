"""Accuracy, perplexity and loss per data type, collected over the micro-batches of a step.

Nothing here waits for the device before `finish`: sums stay on it, in one tensor, and are added over data ranks in one
collective. Which ranks share a sum is the caller's business, as is which keys are shown.

Legend: T tokens of a micro-batch, V vocabulary, v this rank's part of it, K data types.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.collectives import every_rank
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import IGNORED_LABEL, own_targets
from internlm_ds.parallel.linear_cross_entropy import TokenLosses

# rows of logits that are cast to fp32 at a time: 512 x 103168 x 4 bytes are 0.2 GiB
CHUNK_ROWS = 512
DECIMALS = 4
COUNT_EPSILON = 1e-5


class TokenMetrics:
    """Sums over tokens since the last `finish`.

    Args:
        dataset_types: Names in the order of the type ids; empty in evaluation, where there are none.
        device: Where logits live.
        tensor: The axis the vocabulary is split over; one rank when None.
        vocab_size: V; needed where the axis has several ranks.
    """

    def __init__(
        self,
        dataset_types: Sequence[str] = (),
        *,
        device: torch.device | str = "cpu",
        tensor: Axis | None = None,
        vocab_size: int | None = None,
    ):
        self.tensor, self.vocab_size = tensor or Axis.single("tensor"), vocab_size
        self.dataset_types = tuple(dataset_types)
        # row 0 sums all tokens, row 1 + k those of type k; columns: right answers, targets, sum of -log p
        self.totals = torch.zeros(1 + len(self.dataset_types), 3, dtype=torch.float64, device=device)
        self._types = torch.arange(len(self.dataset_types), device=device)

    def update(self, logits: Tensor, labels: Tensor, type_ids: Tensor | None = None) -> None:
        """Add one micro-batch: logits `(T, v)`, int64 labels with -100 and type ids `(T,)` (None without types)."""
        with torch.no_grad():
            labels = labels.reshape(-1)
            logits = logits.reshape(len(labels), -1)
            self._add(token_values(logits, labels, tensor=self.tensor, vocab_size=self.vocab_size), type_ids)

    def update_from(self, tokens: TokenLosses, labels: Tensor, type_ids: Tensor | None = None) -> None:
        """Add one micro-batch whose likeliest tokens and -log p a chunked loss found."""
        with torch.no_grad():
            labels = labels.reshape(-1)
            counted = labels != IGNORED_LABEL
            self._add(_values(tokens.likeliest, tokens.nll, labels, counted), type_ids)

    def _add(self, values: Tensor, type_ids: Tensor | None) -> None:
        self.totals[0] += values.sum(dim=0)
        if self.dataset_types:
            assert type_ids is not None, "types are counted, but the micro-batch has no type ids"
            # a product instead of a scatter: the order of additions is fixed on every device
            members = (type_ids.reshape(-1) == self._types[:, None]).to(values.dtype)
            self.totals[1:] += members @ values

    def finish(self, group: ProcessGroup | None = None) -> dict[str, float | int]:
        """The metrics of the step, summed over the ranks of `group`; starts anew.

        Returns:
            `acc`, `perplexity`, `acc/TYPE`…, `tokens/TYPE`…, `loss_from_metric`, `loss/TYPE`…, rounded to 4 decimals;
            NaN where nothing was counted, except `acc/TYPE`, which is 0 then.
        """
        if group is not None:
            all_reduce(self.totals, group=group)
        right, count, loss = (column.clone() for column in self.totals.cpu().unbind(dim=1))
        self.totals.zero_()
        mean_loss, types = loss / count, self.dataset_types
        per_type_acc = right / (count + COUNT_EPSILON)
        return {
            "acc": _rounded(right[0] / count[0]),
            "perplexity": _rounded(mean_loss[0].exp()),
            **{f"acc/{name}": _rounded(per_type_acc[k]) for k, name in enumerate(types, start=1)},
            **{f"tokens/{name}": int(count[k]) for k, name in enumerate(types, start=1)},
            "loss_from_metric": _rounded(mean_loss[0]),
            **{f"loss/{name}": _rounded(mean_loss[k]) for k, name in enumerate(types, start=1)},
        }


def token_values(
    logits: Tensor, labels: Tensor, *, tensor: Axis | None = None, vocab_size: int | None = None
) -> Tensor:
    """fp64 `(T, 3)`: is the likeliest token the label, does the label count, -log p(label); all 0 where it does not."""
    counted = labels != IGNORED_LABEL
    targets = labels.masked_fill(~counted, 0)
    if tensor is None or tensor.size == 1:
        likeliest = logits.argmax(dim=-1)
        loss = torch.cat([_losses(*rows) for rows in zip(logits.split(CHUNK_ROWS), targets.split(CHUNK_ROWS))])
    else:
        likeliest, loss = _split_values(logits, targets, tensor, vocab_size)
    return _values(likeliest, loss, targets, counted)


def _values(likeliest: Tensor, loss: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    right = (likeliest == targets) & counted
    return torch.stack((right.double(), counted.double(), loss.double().masked_fill(~counted, 0)), dim=1)


def _split_values(logits: Tensor, targets: Tensor, tensor: Axis, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Likeliest token and -log p(target), each `(T,)`, of logits `(T, v)`; one exchange of four numbers a token."""
    assert vocab_size is not None, "a split vocabulary needs its whole size"
    start, _ = bounds(vocab_size, size=tensor.size, rank=tensor.rank)
    own, elsewhere = own_targets(targets, logits, tensor, vocab_size)
    largest, place = logits.max(dim=-1)
    parts = [_sums(*rows) for rows in zip(logits.split(CHUNK_ROWS), own.split(CHUNK_ROWS))]
    log_sum, at_target = (torch.cat(column).double() for column in zip(*parts))
    mine = torch.stack((largest.double(), (place + start).double(), log_sum, at_target.masked_fill(elsewhere, 0)))
    largest, place, log_sum, at_target = every_rank(mine, tensor).unbind(dim=1)
    # of equal logits the first counts, as in one process
    winner = place.masked_fill(largest < largest.amax(dim=0), vocab_size).amin(dim=0)
    return winner.long(), log_sum.logsumexp(dim=0) - at_target.sum(dim=0)


def _sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log of the sum of e^z, and z(target), in fp32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(dim=-1), logits.gather(1, targets[:, None])[:, 0]


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    log_sum, at_target = _sums(logits, targets)
    return log_sum - at_target


def _rounded(value: Tensor) -> float:
    return round(value.item(), DECIMALS)
