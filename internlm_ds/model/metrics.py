"""Accuracy, perplexity and loss per data type, collected over the micro-batches of a step.

Nothing here waits for the device before `finish`: sums stay on it, in one tensor, and are added over data ranks in one
collective. Which ranks share a sum is the caller's business, as is which keys are shown.

Legend: T tokens of a micro-batch, V vocabulary, K data types.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from internlm_ds.parallel.collectives import require_single
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.cross_entropy import IGNORED_LABEL

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
    """

    def __init__(
        self, dataset_types: Sequence[str] = (), *, device: torch.device | str = "cpu", tensor: Axis | None = None
    ):
        require_single(tensor or Axis.single("tensor"))
        self.dataset_types = tuple(dataset_types)
        # row 0 sums all tokens, row 1 + k those of type k; columns: right answers, targets, sum of -log p
        self.totals = torch.zeros(1 + len(self.dataset_types), 3, dtype=torch.float64, device=device)
        self._types = torch.arange(len(self.dataset_types), device=device)

    def update(self, logits: Tensor, labels: Tensor, type_ids: Tensor | None = None) -> None:
        """Add one micro-batch: logits `(T, V)`, int64 labels with -100 and type ids `(T,)` (None without types)."""
        with torch.no_grad():
            labels = labels.reshape(-1)
            values = token_values(logits.reshape(len(labels), -1), labels)
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


def token_values(logits: Tensor, labels: Tensor) -> Tensor:
    """fp64 `(T, 3)`: is the likeliest token the label, does the label count, -log p(label); all 0 where it does not."""
    counted = labels != IGNORED_LABEL
    targets = labels.masked_fill(~counted, 0)
    right = (logits.argmax(dim=-1) == targets) & counted
    loss = torch.cat([_losses(*rows) for rows in zip(logits.split(CHUNK_ROWS), targets.split(CHUNK_ROWS))])
    return torch.stack((right.double(), counted.double(), loss.double().masked_fill(~counted, 0)), dim=1)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(dim=-1) - logits.gather(1, targets[:, None])[:, 0]


def _rounded(value: Tensor) -> float:
    return round(value.item(), DECIMALS)
