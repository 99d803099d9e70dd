"""`internlm_ds.data_weights`: from keys and weights to sources, and batches drawn from their mixture.

A key is the name of a data type, or the path of a file or folder below `data.train_folder`; the longest key that covers
a file counts. The order of the stream is `mixture`'s; epochs, ramp-up, ranks and positions are the plain sampler's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm_ds.config.names import nearest
from internlm_ds.data.binmeta import IntArray
from internlm_ds.data.mixture import Mixture, Source, share_edges
from internlm_ds.data.sampler import StaticBatchSampler
from internlm_ds.errors import CheckpointError, ConfigError, Problem
from internlm_ds.layout.batch import BatchPlan

logger = logging.getLogger(__name__)

KEY = "internlm_ds.data_weights"
VERSION = 1


class WeightedSampler(StaticBatchSampler):
    """Batches of a mixture; an epoch is as many packs of its stream as the data set has.

    What an epoch leaves over because it fills no batch begins the next one: nothing of the stream is lost. Resumed with
    other weights, a new epoch begins: every source goes on behind the packs that it has given.

    Args:
        mixture: The stream.
        num_packs, others: As `StaticBatchSampler`.
    """

    def __init__(self, mixture: Mixture, num_packs: int, **others: Any):
        self.mixture, self._stream_start = mixture, 0
        super().__init__(num_packs, **others)

    def state_dict(self) -> dict[str, Any]:
        mine = {
            "version": VERSION,
            "weights": {source.name: source.weight for source in self.mixture.sources},
            "drawn_before": dict(self.mixture.drawn_before),
            "stream_start": self._stream_start,
        }
        return {**super().state_dict(), "mixture": mine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `StaticBatchSampler.load_state_dict`.

        Raises:
            CheckpointError: The state is of a run without weights, or of a later version, or seed or ramp-up differ.
        """
        self._check_state(state)
        saved = state["mixture"]
        if int(state["batch_count"]) == 0:
            self._restart({}, start=0)
            super().load_state_dict(state)
        elif _same_mixture(saved["weights"], self.mixture):
            self._restart(saved["drawn_before"], start=int(saved["stream_start"]))
            super().load_state_dict(state)
        else:
            self._go_on_with_other_weights(state)

    def _go_on_with_other_weights(self, state: Mapping[str, Any]) -> None:
        saved = state["mixture"]
        consumed = int(state["num_consumed_samples_in_epoch"]) * int(state["data_world_size"]) + int(state["odd_packs"])
        unread = np.zeros(1, dtype=np.int64)
        sources = [Source(name, float(weight), unread) for name, weight in saved["weights"].items()]
        before = Mixture(sources, seed=self.seed, drawn_before=saved["drawn_before"])
        drawn = before.drawn(int(saved["stream_start"]) + consumed)
        self._restart(drawn, start=0)
        now = {source.name: source.weight for source in self.mixture.sources}
        logger.warning("the weights of the data have changed: %s at the checkpoint, %s now", saved["weights"], now)
        begins = {"epoch": int(state["epoch"]) + 1, "num_consumed_samples_in_epoch": 0, "odd_packs": 0}
        sizes = {"data_world_size": self.data_size, "batch_size": self.batch_size}
        count = {"epoch_start_batch_count": state["batch_count"], "is_dealt_anew": False}
        super().load_state_dict({**state, **begins, **sizes, **count})

    def _restart(self, drawn_before: Mapping[str, int], *, start: int) -> None:
        self.mixture = Mixture(self.mixture.sources, seed=self.seed, drawn_before=drawn_before)
        self._stream_start = start

    def _next_epoch(self) -> None:
        self._stream_start += self.num_consumed_samples_in_epoch * self.data_size + self._odd_packs
        super()._next_epoch()

    def _next_order(self) -> IntArray:
        self._rng_state = self._rng.get_state()
        return self.mixture.numbers(self._stream_start, self.num_packs)

    def _rewind_orders(self) -> None:
        """The stream needs no replay."""

    def _check_state(self, state: Mapping[str, Any]) -> None:
        saved = state.get("mixture")
        if saved is None:
            message = f"the checkpoint's data order was made without {KEY}, this run has them; remove them"
            raise CheckpointError(f"{message}, or load without the sampler: the data then begins anew")
        if saved["version"] != VERSION:
            found = f"{saved['version']}, this version of internlm-ds knows {VERSION}"
            raise CheckpointError(f"the checkpoint's mixture of data is of version {found}; load without the sampler")
        super()._check_state({key: value for key, value in state.items() if key != "mixture"})


def sources_of(weights: Mapping[str, float], names: Sequence[str], counts: Sequence[int]) -> list[Source]:
    """The sources that weights make of files.

    Args:
        weights: By key; 0 leaves the files of a key out.
        names: Path of each file below `data.train_folder`, e.g. `en/books/x.bin`.
        counts: Packs of each file.
    Raises:
        ConfigError: All keys that name nothing, files without a weight and weights without a pack, together.
    """
    owners = [_owner(name, weights) for name in names]
    ends = np.cumsum(counts, dtype=np.int64)
    sources, problems = [], [*_unknown_keys(weights, names, owners), *_uncovered(names, owners)]
    for key, weight in sorted(weights.items()):
        mine = [place for place, owner in enumerate(owners) if owner == key]
        numbers = [np.arange(ends[place] - counts[place], ends[place]) for place in mine]
        if weight > 0 and mine and not sum(map(len, numbers)):
            message = "its files do not fill one pack (micro_bsz x seq_len tokens of one file); write 0, or add data"
            problems.append(Problem(f"{KEY}[{key!r}]", message, weight))
        elif weight > 0 and mine:
            sources.append(Source(key, float(weight), np.concatenate(numbers)))
    if not problems and not sources:
        problems.append(Problem(KEY, "gives every file the weight 0; one must be above", dict(weights)))
    if problems:
        raise ConfigError(problems)
    return sources


@dataclass(frozen=True)
class SourceFacts:
    """A source over a number of steps.

    Attributes:
        name: Its key in `data_weights`.
        asked: Its share by weight.
        given: Its share of the packs of these steps.
        packs: Packs it has.
        passes: How often these steps go through them.
    """

    name: str
    asked: float
    given: float
    packs: int
    passes: float

    def __str__(self) -> str:
        shares = f"{100 * self.asked:.4g} % asked, {100 * self.given:.4g} % given"
        return f"{self.name}: {shares}, its {self.packs} packs seen {self.passes:.2f} times"


def facts_of(mixture: Mixture, *, batch: BatchPlan, steps: int) -> list[SourceFacts]:
    """What each source gives to the first `steps` steps of a run."""
    drawn_in_all = batch.data * sum(batch.micro_num_at(index) for index in range(steps))
    drawn, found = mixture.drawn(drawn_in_all), []
    for source in mixture.sources:
        count = drawn[source.name] - mixture.drawn_before[source.name]
        given, passes = count / max(drawn_in_all, 1), count / len(source.numbers)
        found.append(SourceFacts(source.name, mixture.shares[source.name], given, len(source.numbers), passes))
    return found


def _owner(name: str, weights: Mapping[str, float]) -> str | None:
    """The longest key that is the file's path, or a folder above it."""
    covering = [key for key in weights if name == key.strip("/") or name.startswith(key.strip("/") + "/")]
    return max(covering, key=lambda key: len(key.strip("/")), default=None)


def _unknown_keys(weights: Mapping[str, float], names: Sequence[str], owners: Sequence[str | None]) -> list[Problem]:
    folders = {name.rsplit("/", depth)[0] for name in names for depth in range(1, name.count("/") + 1)}
    known = sorted(folders | set(names))
    problems = []
    for key, weight in weights.items():
        if key in owners:
            continue
        if key.strip("/") in known:
            message = "every file below it has a longer key of its own; remove it"
        else:
            close = nearest(key, known)
            types = ", ".join(sorted({name.partition("/")[0] for name in names}))
            hint = f"did you mean {close!r}?" if close else f"the types are {types}"
            message = f"names no type, folder or file with data below data.train_folder; {hint}"
        problems.append(Problem(f"{KEY}[{key!r}]", message, weight))
    return problems


def _uncovered(names: Sequence[str], owners: Sequence[str | None]) -> list[Problem]:
    missing: dict[str, int] = {}
    for name, owner in zip(names, owners):
        if owner is None:
            missing[name.partition("/")[0]] = missing.get(name.partition("/")[0], 0) + 1
    return [
        Problem(KEY, f"gives no weight to {count} file(s) of type {kind!r}; add {kind!r}: 0 to leave them out",
                has_value=False)
        for kind, count in missing.items()
    ]  # fmt: skip


def _same_mixture(weights: Mapping[str, float], mixture: Mixture) -> bool:
    if list(weights) != [source.name for source in mixture.sources]:
        return False
    return bool((share_edges(list(weights.values())) == mixture.edges).all())
