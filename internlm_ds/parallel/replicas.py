"""Are the copies of every parameter still equal? A hash of each, compared over all ranks in one small collective.

Data-parallel ranks hold the same weights, tensor ranks the same norms; nothing in a step compares them, so a copy that
once differs (a bit flip, an operation that is not deterministic) trains on unnoticed. When to look is the loop's
business.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from internlm_ds.errors import ReplicasDifferError
from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.comm import ProcessComm
from internlm_ds.parallel.shards import shard_of_parameter

# what is compared: a parameter, or the same shard of it
Key = tuple[str, Shard | None]

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS = 1024
# parameters named in full when copies differ
MOST_NAMED = 8


class ReplicaCheck:
    """Compares the copies of this rank's parameters with those of other ranks. Collective: every rank makes one.

    Args:
        parameters: `(logical name, parameter)` of this rank.
        comm: Over all ranks.
        device: Where they are.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, comm: ProcessComm, device: torch.device | str = "cpu"
    ):
        self._comm, self._device = comm, torch.device(device)
        held: dict[Key, nn.Parameter] = {(name, shard_of_parameter(p)): p for name, p in parameters}
        # what more than one rank holds, in one order on all of them
        self.keys: list[Key] = comm.broadcast(_held_twice(comm.gather(list(held))))
        self._own = [(place, held[key]) for place, key in enumerate(self.keys) if key in held]
        # multipliers of a hash: odd, so that no bit of a column's sum is lost
        self._weights = torch.arange(1, 2 * COLUMNS, 2, dtype=torch.int64, device=self._device)

    def check(self) -> None:
        """Compare; a collective of two numbers per parameter. Every rank calls it at the same step.

        Raises:
            ReplicasDifferError: On all ranks, when the copies of a parameter are not equal bit for bit.
        """
        if not self.keys:
            return
        hashes = [bit_hash(parameter, self._weights) for _, parameter in self._own]
        # the largest hash and the largest of its complement: they are complements exactly if all are equal
        bounds = torch.full((2, len(self.keys)), torch.iinfo(torch.int64).min, device=self._device)
        if hashes:
            places, own = torch.tensor([place for place, _ in self._own], device=self._device), torch.stack(hashes)
            bounds[0, places], bounds[1, places] = own, ~own
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if not torch.equal(bounds[0], ~bounds[1]):
            differing = [self.keys[i] for i in (bounds[0] != ~bounds[1]).nonzero().flatten().tolist()]
            self._fail(differing, dict(zip((self.keys[place] for place, _ in self._own), hashes, strict=True)))

    def _fail(self, differing: list[Key], hashes: Mapping[Key, Tensor]) -> None:
        """Ask who holds what, and raise the same words on every rank."""
        own = [int(hashes[key]) if key in hashes else None for key in differing]
        everyone = self._comm.broadcast(self._comm.gather(own))
        lines = []
        for place, key in enumerate(differing):
            by_hash: dict[int, list[int]] = defaultdict(list)
            for rank, values in enumerate(everyone):
                if values[place] is not None:
                    by_hash[values[place]].append(rank)
            lines.append(f"{_spell(key)}: {_parties(list(by_hash.values()))}")
        raise ReplicasDifferError(_message(lines))


def bit_hash(tensor: Tensor, weights: Tensor) -> Tensor:
    """A number, int64 `()`, that depends on every bit of a tensor and, within 1024 elements, on where it is.

    Sums wrap around, so the order in which a device adds does not matter; NaNs are bits like all others.

    Args:
        tensor: Any.
        weights: 1024 odd int64 numbers.
    """
    bits = tensor.detach().contiguous().flatten().view(BITS[tensor.element_size()])
    whole = bits.numel() // COLUMNS * COLUMNS
    sums = bits[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64)
    rest = bits[whole:].to(torch.int64)
    return (sums * weights).sum() + (rest * weights[: rest.numel()]).sum()


def _held_twice(keys_by_rank: list[list[Key]] | None) -> list[Key] | None:
    """On rank 0: what several ranks hold."""
    if keys_by_rank is None:
        return None
    count = Counter(key for keys in keys_by_rank for key in keys)
    return [key for key, ranks in count.items() if ranks > 1]


def _spell(key: Key) -> str:
    name, shard = key
    return name if shard is None else f"{name} (part {shard.rank + 1} of {shard.size})"


def _parties(groups: list[list[int]]) -> str:
    """Who differs from whom: the fewest ranks last, as they are most likely wrong."""
    groups.sort(key=lambda ranks: (-len(ranks), ranks))
    return "; ".join(f"rank{'s' * (len(g) > 1)} {', '.join(map(str, g))}" for g in groups[:MOST_NAMED]) + " differ"


def _message(lines: list[str]) -> str:
    shown, more = lines[:MOST_NAMED], len(lines) - MOST_NAMED
    if more > 0:
        shown.append(f"and {more} more")
    return "\n  ".join(
        [
            f"copies of {len(lines)} parameter{'s' * (len(lines) > 1)} are no longer equal on all ranks that hold "
            "them; nothing is saved: look at the memory and the network of these ranks, and start again from the last "
            "checkpoint (internlm_ds.guard.drift_every = 0 looks no more)",
            *shown,
        ]
    )
