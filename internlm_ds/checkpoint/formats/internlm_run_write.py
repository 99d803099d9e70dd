"""Writes what lies beside the weights in a checkpoint of an InternLM run, for any layout: the other way of
`internlm_run`.

InternLM's files name classes of its own (`ParallelMode` in the optimizer's groups). They are named here without being
there: the pickle holds the name, nothing is imported. Flat tensors are mapped from scratch files while they are put
together, so memory does not grow with the model.
"""

from __future__ import annotations

import math
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from internlm_ds.arch.spec import ModelArch, ParamSpec
from internlm_ds.checkpoint.formats import internlm
from internlm_ds.checkpoint.formats.internlm_run import CONFIG_TEXT, CONTEXT, FP32_GROUP, KINDS, SAMPLER, SCHEDULE
from internlm_ds.layout.stages import partition_uniform
from internlm_ds.layout.zero_partition import ZeroPartition, partition
from internlm_ds.optim.schedules import LrSchedule

GROUPS = ("default", FP32_GROUP)
_MODE = ("internlm.core.context.process_group_initializer", "ParallelMode")
_SCALER = {"scale": "_scale", "growth_step": "_growth_step", "hysteresis_step": "_hysteresis_step"}
_BF16_SCALE = {"scale": 65536.0, "growth_step": 0, "hysteresis_step": 0}


@dataclass(frozen=True)
class RunState:
    """A run's counters and settings as InternLM keeps them.

    Attributes:
        batch_count: Index of the next batch.
        sampler: `sampler.pt`, None to leave it away.
        loss_scale: State of the scale under our names, None for a new one.
        betas: Adam's, as the next update uses them.
        schedule: `adam.lr` and `lr_scheduler`.
    """

    step_count: int
    batch_count: int
    num_consumed_tokens: int
    inf_nan_skip_batches: int
    optimizer_updates: int
    sampler: Mapping[str, Any] | None
    loss_scale: Mapping[str, float] | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    schedule: LrSchedule
    config_text: str = ""


def write_run(
    folder: Path,
    states: Callable[[str], Mapping[str, torch.Tensor]],
    run: RunState,
    *,
    arch: ModelArch,
    dtype: torch.dtype,
    tensor_size: int = 1,
    pipe: int = 1,
    chunks: int = 1,
    zero_size: int = 1,
) -> None:
    """Write everything but the weights (`internlm.write_weights`) of a checkpoint.

    Args:
        states: A kind of `internlm_run.KINDS` to whole fp32 tensors by logical name.
        dtype: Of the weights: float32 parameters are of another group.
        zero_size: Optimizer files for each tensor rank and stage.
    Raises:
        ConversionError: The model cannot be split that way.
    """
    internlm.check_split(arch, tensor_size=tensor_size, pipe=pipe, chunks=chunks)
    group = GROUPS.index(FP32_GROUP) if dtype == torch.float32 else 0
    ranges = partition_uniform(arch.num_layers, pipe=pipe, chunks=chunks)
    for stage in range(pipe):
        params = [spec for _, spec in internlm.stage_params(arch, ranges[stage], chunks=chunks)]
        for tensor in range(tensor_size):
            own = [spec for spec in params if tensor == 0 or not spec.on_first_tensor_rank_only]
            shapes = [internlm.local_shape(spec, tensor_size=tensor_size) for spec in own]
            shares = partition(shapes, zero_size=zero_size)
            plan = [
                _listed(shares) if number == group else [[] for _ in range(zero_size)] for number in range(len(GROUPS))
            ]
            for zero in range(zero_size):
                rank = pipe * tensor_size * zero_size, tensor, zero, stage
                torch.save(plan, folder / "gpus-{}_wp-0_tp-{}_dp-{}_pp-{}_zo-{}.pt".format(*rank, zero))
                parts = [(own[index], shapes[index]) for index in shares.assignment[zero]]
                with _flat_tensors(folder, states, parts, tensor=tensor, tensor_size=tensor_size) as flats:
                    content = _optimizer(run, flats, group=group, dtype=dtype, plan=plan)
                    _save(content, folder / f"optimizer_tp{tensor}_pp{stage}_zo{zero}.pt")
    _write_small_files(folder, run)


def _listed(shares: ZeroPartition) -> list[list[str]]:
    return [list(entries) for entries in shares.plan]


@contextmanager
def _flat_tensors(
    folder: Path,
    states: Callable[[str], Mapping[str, torch.Tensor]],
    parts: Sequence[tuple[ParamSpec, tuple[int, ...]]],
    *,
    tensor: int,
    tensor_size: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """One zero rank's parameters, each kind as one flat fp32 tensor, mapped from a file that goes when they do."""
    numel = sum(math.prod(shape) for _, shape in parts)
    scratch = [folder / f".flat-{kind}-{secrets.token_hex(4)}" for kind in KINDS]
    flats: dict[str, torch.Tensor] = {}
    try:
        for kind, path in zip(KINDS, scratch) if numel else ():
            flats[kind] = torch.from_file(str(path), shared=True, size=numel, dtype=torch.float32)
        position = 0
        for spec, shape in parts:
            for kind, flat in flats.items():
                piece = internlm.split(states(kind)[spec.name], spec, tensor_size=tensor_size)[tensor]
                assert piece is not None, f"{spec.name} is not of tensor rank {tensor}"
                flat[position : position + math.prod(shape)].view(shape).copy_(piece)
            position += math.prod(shape)
        yield flats
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)


def _optimizer(
    run: RunState, flats: Mapping[str, torch.Tensor], *, group: int, dtype: torch.dtype, plan: list[Any]
) -> dict[str, Any]:
    rate = run.schedule.at(run.step_count)
    scale = {theirs: (run.loss_scale or _BF16_SCALE)[ours] for ours, theirs in _SCALER.items()}
    groups = [
        {
            "lr": rate,
            "betas": run.betas,
            "eps": run.eps,
            "weight_decay": run.weight_decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": True,
            "name": name,
            "optimizer_mode": _ForeignValue(_ForeignName(*_MODE), ("zero1",)),
            "dtype": dtype if number == 0 and group == 0 else None,
            "initial_lr": run.schedule.base_lr,
            "params": [0] if number == group and flats else [],
        }
        for number, name in enumerate(GROUPS)
    ]
    state = {"step": torch.tensor(float(run.optimizer_updates)), **{kind: flats[kind] for kind in KINDS[1:] if flats}}
    return {
        "grad_scaler": scale,
        "base_optim_states": {"state": {0: state} if flats else {}, "param_groups": groups},
        "flat_fp32_weights": {group: flats["master"]} if flats else {},
        "zero_devide_optim_plan": plan,
    }


def _write_small_files(folder: Path, run: RunState) -> None:
    context = {
        "batch_count": run.batch_count - 1,  # the last one trained on
        "num_consumed_samples_in_epoch": int((run.sampler or {}).get("num_consumed_samples_in_epoch", 0)),
        "num_consumed_tokens": run.num_consumed_tokens,
        "inf_nan_skip_batches": run.inf_nan_skip_batches,
        "step_count": run.step_count,
        "tensorboard_folder": None,
    }
    torch.save(context, folder / CONTEXT)
    if run.sampler is not None:
        torch.save(dict(run.sampler), folder / SAMPLER)
    torch.save(scheduler_state(run.schedule, run.step_count), folder / SCHEDULE)
    torch.save(run.config_text, folder / CONFIG_TEXT)
    torch.save({"step": run.step_count}, folder / f"{run.step_count}.step")


def scheduler_state(schedule: LrSchedule, step_count: int) -> dict[str, Any]:
    """`schedulder.pt` after a number of successful updates: a warm-up around a cosine."""
    warmup = int(schedule.total_steps * schedule.warmup_ratio)
    begin = warmup + schedule.init_steps
    base, rates = [schedule.base_lr] * len(GROUPS), [schedule.at(step_count)] * len(GROUPS)
    finished = step_count > begin
    common = {"_is_initial": False, "_get_lr_called_within_step": False}
    cosine = {
        "T_max": schedule.total_steps - begin,
        "eta_min": schedule.eta_min,
        "base_lrs": base,
        "last_epoch": max(0, step_count - begin),
        "_step_count": 1 + max(0, step_count - begin),
        **common,
        "_last_lr": rates if finished else base,
    }
    return {
        "_init_steps": schedule.init_steps,
        "_warmup_steps": warmup,
        "warmup_epochs": begin,
        "finished": finished,
        "base_lrs": base,
        "last_epoch": step_count,
        "_step_count": step_count + 1,
        **common,
        "_last_lr": rates,
        "after_scheduler_type": "CosineAnnealingLR",
        "after_scheduler_dict": cosine,
    }


class _ForeignName:
    """A class of another package, by name: it need not be installed for its name to be written."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *arguments: Any) -> None:
        raise TypeError(f"{self.module}.{self.name} is a name only")


class _ForeignValue:
    """What calling a foreign class gives, once somebody who has it reads the file."""

    def __init__(self, kind: _ForeignName, arguments: tuple[Any, ...]):
        self.kind, self.arguments = kind, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.kind, self.arguments


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the C one asks every name whether it can be imported
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_foreign(self, value: _ForeignName) -> None:
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    dispatch[_ForeignName] = save_foreign


def _save(content: Any, path: Path) -> None:
    torch.save(content, path, pickle_module=SimpleNamespace(__name__="pickle", Pickler=_Pickler))
