"""Which packs make up which batch: InternLM's order over epochs, data-parallel ranks, ramp-up and resumes.

The samplers know numbers of packs, never their content, and keep no torch; `loader` turns them into batches and into
a sampler for DeepSpeed's own loader. Sizes during a ramp-up are `layout.batch`'s.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from internlm_ds.data.binmeta import IntArray
from internlm_ds.errors import CheckpointError, ConfigError, DataFormatError
from internlm_ds.layout.batch import BatchPlan, parse_rampup


class StaticBatchSampler:
    """Batches of pack numbers for one data-parallel rank, epoch after epoch.

    Each epoch is the next shuffle of one generator, cut to whole batches of all ranks; rank r takes every
    `data_size`-th number from r on.

    Args:
        num_packs: Packs of the whole data set.
        batch_size: Packs per batch and rank (`micro_num`).
        rampup: `"start increment every"`, empty for none.
        seed: `data.seed`.
        data_rank, data_size: Place on the data axis and its size.

    Attributes:
        epoch: Number of the current pass, from 0.
        batch_count: Batches drawn over all epochs: the index of the next one.
        num_consumed_samples_in_epoch: Packs drawn from the current epoch, per rank.
        indices: int64, the pack numbers of the current epoch for all ranks.

    Raises:
        DataFormatError: There are too few packs for one batch, or for the ramp-up.
        LayoutError: `rampup` cannot be read.
    Source: InternEvo `StaticBatchSampler`.
    """

    def __init__(
        self,
        num_packs: int,
        *,
        batch_size: int,
        rampup: str | None = "",
        seed: int = 1024,
        data_rank: int = 0,
        data_size: int = 1,
    ):
        self.num_packs, self.batch_size, self.seed = num_packs, batch_size, seed
        self.data_rank, self.data_size = data_rank, data_size
        self.rampup = rampup or ""
        self._plan = BatchPlan(1, 1, batch_size, data_size, parse_rampup(rampup))
        self.epoch, self.batch_count = 0, 0
        self._generator: dict[str, Any] = {}
        self._rng = np.random.RandomState(seed)
        self._begin_epoch()

    def __len__(self) -> int:
        """Batches of an epoch that begins now."""
        step = self.batch_size * self.data_size
        if not self._in_rampup:
            return self.num_packs // step
        return (self.num_packs - self._rampup_packs) // step + self._rampup_batches

    def __iter__(self) -> Iterator[list[int]]:
        """The rest of this epoch; behind its last batch the next epoch begins."""
        while self.num_consumed_samples_in_epoch < len(self._own):
            yield self._draw()
        self._next_epoch()

    def next_batch(self) -> list[int]:
        """Pack numbers of the next batch, whatever its epoch."""
        while self.num_consumed_samples_in_epoch >= len(self._own):
            self._next_epoch()
        return self._draw()

    def next_batch_of_all(self) -> IntArray:
        """Pack numbers of the next batch on all ranks, int64 `(micro_num, data_size)`: column r is rank r's."""
        own, size = len(self.next_batch()), self.data_size
        stop = self.num_consumed_samples_in_epoch * size + self._odd_packs
        return self._order[stop - own * size : stop].reshape(own, size)

    def state_dict(self) -> dict[str, Any]:
        """The true position: small, plain data. Names as in InternLM where it has one; the order follows from it."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "num_consumed_samples_in_epoch": self.num_consumed_samples_in_epoch,
            "batch_count": self.batch_count,
            "epoch_start_batch_count": self._epoch_start,
            "batch_size": self.batch_size,
            "raw_rampup_batch_size": self.rampup,
            "data_world_size": self.data_size,
            "num_packs": self.num_packs,
            # of the packs consumed, those that do not divide among the ranks; both only after ranks or sizes changed
            "odd_packs": self._odd_packs,
            "is_dealt_anew": self._is_dealt_anew,
            **self._generator,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, in the order of an uninterrupted run.

        `batch_size` and the number of ranks may have changed: the rest of the epoch, from the first pack that was not
        consumed, is dealt out anew and cut to whole batches of the new size. InternLM's own states are read as well.

        Raises:
            CheckpointError: Seed or ramp-up differ.
        """
        self._check_state(state)
        self.epoch = int(state["epoch"])
        if not self._restore_generator(state):
            self._rewind_orders()
        # the cut of an epoch depends on whether the ramp-up was over at its start
        self.batch_count = int(state.get("epoch_start_batch_count", 0))
        self._begin_epoch()
        self.batch_count = int(state["batch_count"])
        sizes = int(state["data_world_size"]), int(state.get("batch_size", self.batch_size))
        consumed = int(state["num_consumed_samples_in_epoch"]) * sizes[0] + int(state.get("odd_packs", 0))
        if state.get("is_dealt_anew") or sizes != (self.data_size, self.batch_size):
            self._deal_anew(consumed)
        else:
            self.num_consumed_samples_in_epoch = consumed // self.data_size

    @property
    def rng_state(self) -> Any:
        """numpy's state before the shuffle of this epoch."""
        return self._rng_state

    @property
    def _rampup_batches(self) -> int:
        ramp = self._plan.rampup
        return 0 if ramp is None else (self.batch_size - ramp.start) // ramp.increment * ramp.every

    @property
    def _rampup_packs(self) -> int:
        return self._plan.rampup_samples * self.data_size

    @property
    def _in_rampup(self) -> bool:
        return self.batch_count < self._rampup_batches

    def _draw(self) -> list[int]:
        start = self.num_consumed_samples_in_epoch
        batch = self._own[start : start + self._plan.micro_num_at(self.batch_count)]
        self.num_consumed_samples_in_epoch += len(batch)
        self.batch_count += 1
        return [int(number) for number in batch]

    def _next_epoch(self) -> None:
        self.epoch += 1
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._epoch_start = self.batch_count
        order = self._next_order()
        ramp, step = self._rampup_packs if self._in_rampup else 0, self.batch_size * self.data_size
        if self.num_packs < ramp:
            raise self._too_few(f"the ramp-up {self.rampup!r} on {self.data_size} data-parallel ranks takes {ramp}")
        self._order: IntArray = order
        self.indices: IntArray = order[: (self.num_packs - ramp) // step * step + ramp]
        if len(self.indices) < self.batch_size:
            raise self._too_few(f"a step takes data.micro_num x data-parallel ranks = {step}")
        self._own = self.indices[self.data_rank :: self.data_size]
        self.num_consumed_samples_in_epoch = 0
        self._odd_packs, self._is_dealt_anew = 0, False

    def _next_order(self) -> IntArray:
        """All packs in the order of the epoch that begins, before it is cut."""
        self._rng_state = self._rng.get_state()
        self._generator = {"generator": _written(self._rng_state, self.epoch)} if self.epoch else {}
        order = np.arange(self.num_packs)
        self._rng.shuffle(order)
        return order

    def _restore_generator(self, state: Mapping[str, Any]) -> bool:
        """Take up the generator as it was before the shuffle of the state's epoch, if it is there, for these packs."""
        found = state.get("generator")
        if found is None or found["epoch"] != state["epoch"] or state.get("num_packs") != self.num_packs:
            return False
        words = np.frombuffer(base64.b64decode(found["words"]), dtype="<u4")
        self._rng.set_state(("MT19937", words[:-1].astype(np.uint32), int(words[-1]), 0, 0.0))
        return True

    def _rewind_orders(self) -> None:
        """See to it that `_next_order` gives the order of epoch `self.epoch`."""
        scratch = np.arange(self.num_packs)
        self._rng = np.random.RandomState(self.seed)
        for _ in range(self.epoch):
            self._rng.shuffle(scratch)  # what a shuffle draws depends on the length alone

    def _deal_anew(self, consumed: int) -> None:
        """Share the rest of this epoch's order, whatever was consumed of it and by how many ranks."""
        rest = self._order[consumed:]
        rest = rest[: self._whole_batches(len(rest))]
        self.num_consumed_samples_in_epoch, self._odd_packs = divmod(consumed, self.data_size)
        self._own = np.concatenate(
            [self._order[: self.num_consumed_samples_in_epoch], rest[self.data_rank :: self.data_size]]
        )
        self._is_dealt_anew = True

    def _whole_batches(self, packs: int) -> int:
        """Packs, of so many, that the coming batches of all ranks use up."""
        used, batch = 0, self.batch_count
        while batch < self._rampup_batches:
            step = self._plan.micro_num_at(batch) * self.data_size
            if used + step > packs:
                return used
            used, batch = used + step, batch + 1
        step = self.batch_size * self.data_size
        return used + (packs - used) // step * step

    def _too_few(self, need: str) -> DataFormatError:
        message = f"the training data holds {self.num_packs} packs (of micro_bsz x seq_len tokens) but {need}; "
        return DataFormatError(message + "use more data, or lower data.micro_num, data.micro_bsz or data.seq_len")

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("mixture") is not None:
            message = (
                f"the checkpoint's data order was made with data_weights = {state['mixture']['weights']}, this run "
            )
            raise CheckpointError(
                f"{message}has none; set them back, or load without the sampler: the data begins anew"
            )
        ours = {"seed": self.seed, "raw_rampup_batch_size": self.rampup}
        names = {"seed": "data.seed", "raw_rampup_batch_size": "data.rampup_batch_size"}
        for key, value in ours.items():
            found = state[key] or "" if key == "raw_rampup_batch_size" else state[key]
            if found != value:
                message = f"the checkpoint's data order was made with {names[key]} = {found!r}, this run has {value!r}"
                raise CheckpointError(f"{message}; set it back, or load without the sampler")


def _written(state: Any, epoch: int) -> dict[str, Any]:
    """A generator before the shuffle of a later epoch, as text: else as many shuffles lead there again."""
    words = np.append(state[1].astype("<u4"), np.uint32(state[2])).astype("<u4")
    return {"epoch": epoch, "words": base64.b64encode(words.tobytes()).decode("ascii")}


def internlm_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """A sampler's state as InternLM's `sampler.pt` has it; None where its sampler has no such position.

    Args:
        state: Of `StaticBatchSampler`, or one of InternLM's already.
    """
    if "rng_state" in state:
        return dict(state)
    if "num_packs" not in state or state.get("is_dealt_anew") or state.get("odd_packs") or "mixture" in state:
        return None
    size = int(state["data_world_size"])
    rampup = str(state["raw_rampup_batch_size"])
    sampler = StaticBatchSampler(
        int(state["num_packs"]),
        batch_size=int(state["batch_size"]),
        rampup=rampup,
        seed=int(state["seed"]),
        data_size=size,
    )
    sampler.load_state_dict(state)
    return {
        "batch_size": sampler.batch_size,
        "raw_rampup_batch_size": rampup,
        "rng_state": sampler.rng_state,
        "epoch": sampler.epoch,
        "seed": sampler.seed,
        "data_world_size": size,
        "num_consumed_samples_in_epoch": sampler.num_consumed_samples_in_epoch,
        "batch_count": sampler.batch_count,
        "indices": sampler.indices,
    }


class DataParallelSampler:
    """Sample numbers of one rank in order, as evaluation takes them.

    Args:
        num_samples: Samples of the set.
        data_rank, data_size: Place on the data axis and its size.
        drop_last: Leave out what does not divide; otherwise begin again from the first samples.

    Source: InternEvo `DataParallelSampler` with `shuffle=False`.

    >>> list(DataParallelSampler(7, data_rank=1, data_size=2, drop_last=False))
    [1, 3, 5, 0]
    """

    def __init__(self, num_samples: int, *, data_rank: int, data_size: int, drop_last: bool):
        self.num_samples, self.data_rank, self.data_size = num_samples, data_rank, data_size
        self._len = num_samples // data_size if drop_last else -(-num_samples // data_size)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._len:
            raise IndexError(f"sample {index} of {self._len}")
        return (self.data_rank + index * self.data_size) % self.num_samples

    def __iter__(self) -> Iterator[int]:
        return (self[index] for index in range(self._len))


class BatchSkipper:
    """`data.skip_batches`: batch indices `a` and ranges `a-b` (both ends included), separated by commas.

    Raises:
        ConfigError: A part cannot be read, or a range runs backwards.

    >>> skipped = BatchSkipper("1,4-6")
    >>> [index for index in range(8) if skipped(index)]
    [1, 4, 5, 6]
    """

    def __init__(self, text: str | None):
        self.ranges = [_parse_range(part.strip(), str(text)) for part in (text or "").split(",") if part.strip()]

    def __call__(self, index: int) -> bool:
        return any(low <= index <= high for low, high in self.ranges)


def _parse_range(part: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    if match is None:
        raise ConfigError(f'data.skip_batches = {text!r}: {part!r} is no batch index and no range; write e.g. "3,8-10"')
    low, high = int(match[1]), int(match[2] or match[1])
    if low > high:
        raise ConfigError(f'data.skip_batches = {text!r}: a range runs from low to high; write "{high}-{low}"')
    return low, high
