"""What lies beside the weights in a checkpoint of an InternLM run: optimizer, scaler, counters, sampler.

Reads `optimizer_tp{t}_pp{p}_zo{z}.pt` of any layout into whole tensors under the parameters' logical names, so that a
run goes on here at another layout. Each file holds one flat fp32 tensor for each group of parameters: the parameters
that its zero rank owns, in the order of the plan beside it. The names and the merging of tensor ranks and stages are
`internlm`'s, the order of parameters is `layout.zero_partition`'s.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.names import STEP_FILE
from internlm_ds.checkpoint.unpickle import LazyTensor
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.shards import Shard
from internlm_ds.layout.zero_partition import partition
from internlm_ds.parallel.shards import take

OPTIMIZER_FILE = re.compile(r"optimizer_tp(\d+)_pp(\d+)_zo(\d+)\.pt$")
CONTEXT, SAMPLER, SCHEDULE, CONFIG_TEXT = "context.pt", "sampler.pt", "schedulder.pt", "config_file.pt"
KINDS = ("master", "exp_avg", "exp_avg_sq")
FP32_GROUP = "fp32"
_PLAN = "zero_devide_optim_plan"
_SCALER = {"_scale": "scale", "_growth_step": "growth_step", "_hysteresis_step": "hysteresis_step"}

Rank = tuple[int, int]
States = Mapping[Rank, Mapping[str, LazyTensor]]


def held_parts(folder: Path) -> frozenset[str]:
    """Which of model, optimizer, scheduler and sampler a folder gives; names are looked at only."""
    names = {path.name for path in folder.iterdir()}
    found = {"model"}
    if any(OPTIMIZER_FILE.fullmatch(name) for name in names):
        found.add("optimizer")
    if CONTEXT in names:
        found.add("scheduler")  # rates here are functions of the step count
        found |= {"sampler"} if SAMPLER in names else set()
    return frozenset(found)


def step_of(folder: Path) -> int | None:
    """Successful updates by the name of the file `N.step`, None without one."""
    steps = [int(match[1]) for path in folder.iterdir() if (match := STEP_FILE.fullmatch(path.name))]
    return max(steps, default=None)


def check(folder: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Read the `.pt` files of a folder against their checksums, of `(rank, ranks)` this rank's share.

    Raises:
        CheckpointError: A weight file is missing, or something that is no file of `torch.save`.
        CheckpointDamagedError: A file is damaged.
    """
    internlm.find_model_files(folder)
    rank, ranks = share
    for path in sorted(folder.glob("*.pt"))[rank::ranks]:
        unpickle.check(path)


class InternlmRun:
    """The checkpoint of an InternLM run, as `native.NativeCheckpoint` shows one of ours.

    Args:
        folder: Holds the files.
        arch: What is to be loaded into.
        mlp_names: See `internlm.read_weights`.

    Attributes:
        weights: Whole parameters by logical name, each read when it is asked for.

    Raises:
        CheckpointError: Files are missing, or do not fit the model or each other.
        CheckpointDamagedError: A file is damaged (noticed when it is read).
    """

    def __init__(self, folder: Path, *, arch: ModelArch, mlp_names: str | None = None):
        self.folder, self._arch, self._mlp_names = folder, arch, mlp_names
        self._states = internlm.read_states(folder)
        self.weights = internlm.read_weights(folder, arch=arch, mlp_names=mlp_names)
        self.parts = held_parts(folder)
        self._merged: dict[str, Mapping[str, torch.Tensor]] = {}
        self._whole = functools.lru_cache(maxsize=len(KINDS))(self._read_whole)

    @functools.cached_property
    def optimizer(self) -> OptimizerFiles:
        """The optimizer's files, opened."""
        return OptimizerFiles(self.folder, self._states)

    def fragment(self, name: str, kind: str, start: int, numel: int, shard: Shard | None = None) -> torch.Tensor:
        """fp32 `(numel,)`: elements `[start, start + numel)` of a kind of optimizer state of a flattened parameter.

        Args:
            kind: One of `KINDS`.
            shard: What is flattened; None: the whole parameter.
        """
        return take(self._whole(name, kind), shard).flatten()[start : start + numel]

    def state(self, kind: str) -> Mapping[str, torch.Tensor]:
        """One kind of optimizer state: fp32 tensors shaped like the parameters, by logical name."""
        if kind not in self._merged:
            self._merged[kind] = internlm.merged(
                self.optimizer.pieces(kind), folder=self.folder, arch=self._arch, mlp_names=self._mlp_names
            )
        return self._merged[kind]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Settings of the optimizer's groups (`lr`, `betas`, `initial_lr`, …) as the first file has them."""
        return self.optimizer.groups

    @property
    def schedule(self) -> dict[str, Any]:
        """`schedulder.pt`, {} where there is none."""
        path = self.folder / SCHEDULE
        return _dict(path) if path.exists() else {}

    @property
    def config_text(self) -> str:
        """Text of the configuration, "" where it was not stored."""
        path = self.folder / CONFIG_TEXT
        text = unpickle.load(path) if path.exists() else ""
        return text if isinstance(text, str) else ""

    @property
    def train_state(self) -> dict[str, Any]:
        """Counters, sampler and scaler under our names, as far as the folder has them."""
        values: dict[str, Any] = {}
        if "scheduler" in self.parts:
            context = _dict(self.folder / CONTEXT)
            values |= {key: int(context.get(key, 0)) for key in ("step_count", "inf_nan_skip_batches")}
            values["num_consumed_tokens"] = int(context.get("num_consumed_tokens", 0))
            values["batch_count"] = int(context["batch_count"]) + 1  # theirs is the last one trained on
        if "sampler" in self.parts:
            values["sampler"] = _dict(self.folder / SAMPLER)
        if "optimizer" in self.parts:
            values["optimizer_updates"] = self.optimizer.num_updates
            values["loss_scale"] = self.optimizer.loss_scale
        return values

    def _read_whole(self, name: str, kind: str) -> torch.Tensor:
        return self.state(kind)[name]


@dataclass(frozen=True)
class _File:
    """One rank's optimizer file: flat tensors by group, the groups' names, the plan for all zero ranks."""

    path: Path
    flats: Mapping[str, Mapping[int, LazyTensor]]
    groups: tuple[str, ...]
    plan: Sequence[Sequence[Sequence[str]]] | None
    num_updates: int
    scaler: Mapping[str, Any]
    settings: list[dict[str, Any]]


class OptimizerFiles:
    """All `optimizer_tp{t}_pp{p}_zo{z}.pt` of a folder.

    Args:
        folder: Holds them.
        states: The state dicts beside them: which parameters each `(tensor rank, stage)` has, in the model's order.

    Attributes:
        num_updates: Adam's own count.
        loss_scale: State of the loss scale under our names, None if there is none.

    Raises:
        CheckpointError: Files of some ranks are missing, or their sizes are not those of the weights.
    """

    def __init__(self, folder: Path, states: States):
        self.folder, self._states = folder, states
        self._files = {key: _open(path) for key, path in _find(folder, ranks=sorted(states)).items()}
        first = self._files[min(self._files)]
        self.groups = first.settings
        self.num_updates = max(file.num_updates for file in self._files.values())
        known = {ours: first.scaler[theirs] for theirs, ours in _SCALER.items() if theirs in first.scaler}
        self.loss_scale = known if len(known) == len(_SCALER) else None

    def pieces(self, kind: str) -> dict[Rank, dict[str, LazyTensor]]:
        """Local names of each rank's parameters to their part of the flat tensors, shaped like the parameters."""
        found: dict[Rank, dict[str, LazyTensor]] = {}
        for rank, state in self._states.items():
            files = [self._files[key] for key in sorted(self._files) if key[:2] == rank]
            located = {}
            for group, name in enumerate(files[0].groups):
                members = [key for key, tensor in state.items() if _belongs(tensor, name, files[0].groups)]
                located |= self._located(files, kind, group, {key: state[key].shape for key in members})
            missing = [key for key in state if key not in located]
            if missing:
                raise CheckpointError(f"{files[0].path} and its neighbours hold no {kind} of {', '.join(missing[:4])}")
            found[rank] = {key: located[key] for key in state}
        return found

    def _located(
        self, files: Sequence[_File], kind: str, group: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, LazyTensor]:
        """The parameters of one group in the flat tensors of its zero ranks."""
        names = list(shapes)
        order = sorted(range(len(names)), key=lambda index: -math.prod(shapes[names[index]]))
        plan = files[0].plan[group] if files[0].plan else partition(list(shapes.values()), zero_size=len(files)).plan
        if len(plan) != len(files):
            raise CheckpointError(
                f"{files[0].path}: its plan is for {len(plan)} zero ranks, there are {len(files)} files"
            )
        located: dict[str, LazyTensor] = {}
        for file, entries in zip(files, plan):
            flat, position = file.flats[kind].get(group), 0
            for entry in entries:
                turn, *shape = map(int, entry.split("_"))
                name = names[order[turn]] if turn < len(order) else None
                if name is None or shapes[name] != tuple(shape) or flat is None:
                    raise CheckpointError(
                        f"{file.path}: its plan has {entry!r} (place and shape) in group {group}, "
                        f"the weights beside it have {list(shapes[name]) if name else 'no such parameter'}"
                    )
                located[name] = flat.part(position, tuple(shape))
                position += math.prod(shape)
            if flat is not None and position != flat.shape[0]:
                raise CheckpointDamagedError(
                    f"{file.path}: the {kind} of group {group} has {flat.shape[0]} elements, its plan {position}"
                )
        return located


def _belongs(weight: LazyTensor, group: str, groups: Sequence[str]) -> bool:
    """A parameter of dtype float32 is of the group `fp32`, where there is one; all others are of the first."""
    is_fp32 = weight.dtype == torch.float32 and FP32_GROUP in groups
    return group == FP32_GROUP if is_fp32 else group == groups[0]


def _find(folder: Path, *, ranks: Sequence[Rank]) -> dict[tuple[int, int, int], Path]:
    found = {
        (int(match[1]), int(match[2]), int(match[3])): path
        for path in sorted(folder.iterdir())
        if (match := OPTIMIZER_FILE.fullmatch(path.name))
    }
    zero_size = 1 + max((key[2] for key in found), default=0)
    wanted = {(*rank, zero) for rank in ranks for zero in range(zero_size)}
    missing, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or extra:
        shown = ", ".join("optimizer_tp{}_pp{}_zo{}.pt".format(*key) for key in (missing or extra)[:4])
        what = "lacks" if missing else "has, without weights of the same rank,"
        raise CheckpointError(f'{folder} {what} {shown}; load it with load_ckpt_info = dict(…, content=("model",))')
    return found


def _open(path: Path) -> _File:
    content = unpickle.load(path, lazy=True)
    try:
        base = content["base_optim_states"]
        groups = tuple(group.get("name", "default") for group in base["param_groups"])
        numbers = [group["params"] for group in base["param_groups"]]
        flats: dict[str, dict[int, LazyTensor]] = {"master": dict(content["flat_fp32_weights"])}
        for kind in KINDS[1:]:
            flats[kind] = {
                group: base["state"][params[0]][kind]
                for group, params in enumerate(numbers)
                if params and base["state"]
            }
        steps = [
            int(state["step"].load() if isinstance(state["step"], LazyTensor) else state["step"])
            for state in base["state"].values()
        ]
        scaler, settings = content.get("grad_scaler", {}), list(base["param_groups"])
        return _File(path, flats, groups, content.get(_PLAN), max(steps, default=0), scaler, settings)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is no optimizer file of InternLM: {type(error).__name__}: {error}") from error


def _number(value: LazyTensor | float) -> int:
    return int(value.load() if isinstance(value, LazyTensor) else value)


def _dict(path: Path) -> dict[str, Any]:
    value = unpickle.load(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a dict was expected, found {type(value).__name__}")
    return value
