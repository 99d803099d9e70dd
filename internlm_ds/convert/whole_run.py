"""Whole runs between the native and InternLM's format: optimizer, scaler, counters and sampler beside the weights.

A run's settings (rates, betas) come from where the source keeps them: our `train_state.json`, InternLM's groups and
`schedulder.pt`, or a configuration that is given. The files themselves are `checkpoint.formats`'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.internlm_run import KINDS, InternlmRun
from internlm_ds.checkpoint.formats.internlm_run_write import RunState
from internlm_ds.config.schema import Config
from internlm_ds.convert.sources import Source
from internlm_ds.data.sampler import internlm_state
from internlm_ds.errors import ConfigError, ConversionError
from internlm_ds.optim.schedules import LrSchedule, recorded_settings


@dataclass(frozen=True)
class WholeRun:
    """What a checkpoint of a run holds beside the weights.

    Attributes:
        states: A kind of optimizer state to whole fp32 tensors by logical name.
        values: As `train_state.json` has them.
        config_text: Text of the configuration.
        notes: What does not go along, and why.
    """

    states: Callable[[str], Mapping[str, torch.Tensor]]
    values: Mapping[str, Any]
    config_text: str
    notes: tuple[str, ...] = field(default=())

    def fragments(self) -> Iterator[native.Fragment]:
        """All of the optimizer state, a parameter at a time."""
        for name in self.states(KINDS[0]):
            for kind in KINDS:
                yield native.Fragment(name, kind, 0, self.states(kind)[name].flatten())

    @property
    def run_state(self) -> RunState:
        """What InternLM's files say of the run."""
        values, adam = self.values, self.values["adam"]
        return RunState(
            step_count=int(values["step_count"]),
            batch_count=int(values["batch_count"]),
            num_consumed_tokens=int(values["num_consumed_tokens"]),
            inf_nan_skip_batches=int(values["inf_nan_skip_batches"]),
            optimizer_updates=int(values["optimizer_updates"]),
            sampler=internlm_state(values["sampler"]),
            loss_scale=values.get("loss_scale"),
            betas=(adam["betas"][0], adam["betas"][1]),
            eps=adam["eps"],
            weight_decay=adam["weight_decay"],
            schedule=LrSchedule(**values["lr_schedule"]),
            config_text=self.config_text,
        )


def open_run(source: Source, config: Path | None, *, mlp_names: str | None) -> WholeRun:
    """The run that a source is a checkpoint of.

    Args:
        config: A configuration whose rates are taken instead of the recorded ones.
    Raises:
        ConversionError: It holds weights only, or does not say its rates and no configuration is given.
    """
    settings = _settings_of(config) if config else None
    if source.kind == "native":
        return of_native(source.folder, config=settings)
    return of_internlm(source.folder, arch=source.arch, mlp_names=mlp_names, config=settings)


def _settings_of(path: Path) -> Config:
    from internlm_ds.config import load

    loaded = load(path)
    if loaded.problems:
        raise ConfigError(loaded.problems, path=loaded.path)
    return loaded.config


def compare(folder: Path, run: WholeRun, source: Source, *, target_format: str) -> None:
    """Read back what was written: every tensor bit for bit, the counters, the scale.

    Raises:
        ConversionError: Something differs; all of it is listed.
    """
    if target_format == "native":
        again = of_native(folder, config=None)
    else:
        again = of_internlm(folder, arch=source.arch, mlp_names="2024", config=None)
    keys = ("step_count", "batch_count", "num_consumed_tokens", "inf_nan_skip_batches", "optimizer_updates")
    problems = [
        f"{key}: {again.values[key]} instead of {run.values[key]}"
        for key in keys
        if again.values[key] != run.values[key]
    ]
    for kind in KINDS:
        before, after = run.states(kind), again.states(kind)
        problems += [
            f"{kind} of {name}: reads back differently" for name in before if not _equal(before[name], after[name])
        ]
    if problems:
        raise ConversionError("the written checkpoint is not equal to its source:\n  " + "\n  ".join(problems))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def of_native(folder: Path, *, config: Config | None) -> WholeRun:
    """A run's native checkpoint.

    Raises:
        ConversionError: It holds weights only, or does not say its rates and no configuration is given.
    """
    checkpoint = native.open(folder, verify=False)
    values = dict(checkpoint.train_state)
    if not checkpoint.kinds:
        raise ConversionError(f"{folder} holds weights only; write --content model")
    if config is not None:
        values |= recorded_settings(config, num_updates=int(values["step_count"]))
    if "lr_schedule" not in values:
        raise ConversionError(f"{folder} does not say its learning rates; give --config, the run's configuration")
    lost = internlm_state(values["sampler"]) is None
    note = "sampler.pt is left away: the run's order of data is not one that InternLM has"
    shapes = checkpoint.shapes

    def states(kind: str) -> Mapping[str, torch.Tensor]:
        return _States(checkpoint, kind, shapes)

    return WholeRun(states, values, checkpoint.config_text, (note,) if lost else ())


class _States(Mapping[str, torch.Tensor]):
    """One kind of a native checkpoint's optimizer state; each tensor is read when it is asked for."""

    def __init__(self, checkpoint: native.NativeCheckpoint, kind: str, shapes: Mapping[str, tuple[int, ...]]):
        self._checkpoint, self._kind, self._shapes = checkpoint, kind, shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        return self._checkpoint.fragment(name, self._kind, 0, torch.Size(shape).numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def of_internlm(folder: Path, *, arch: ModelArch, mlp_names: str | None, config: Config | None) -> WholeRun:
    """A run's checkpoint in InternLM's format.

    Raises:
        ConversionError: Parts of it are not there.
    """
    run = InternlmRun(folder, arch=arch, mlp_names=mlp_names)
    missing = {"optimizer", "scheduler", "sampler"} - run.parts
    if missing:
        raise ConversionError(f"{folder} holds no {', '.join(sorted(missing))}; write --content model")
    values = {**run.train_state, "bad_steps_in_a_row": 0}
    values["num_consumed_samples_in_epoch"] = values["sampler"]["num_consumed_samples_in_epoch"]
    values |= recorded_settings(config, num_updates=values["step_count"]) if config else _recorded(run)
    return WholeRun(run.state, values, run.config_text)


def _recorded(run: InternlmRun) -> dict[str, Any]:
    """The same as `recorded_settings`, from the groups and the scheduler of a run."""
    group, schedule = run.groups[0], run.schedule
    try:
        cosine = schedule["after_scheduler_dict"]
        total = int(schedule["warmup_epochs"] + cosine["T_max"])
        lr_schedule = {
            "base_lr": float(group.get("initial_lr", group["lr"])),
            "total_steps": total,
            "init_steps": int(schedule["_init_steps"]),
            "warmup_ratio": _ratio(int(schedule["_warmup_steps"]), total),
            "eta_min": float(cosine["eta_min"]),
        }
        adam = {"betas": list(group["betas"]), "eps": group["eps"], "weight_decay": group["weight_decay"]}
    except KeyError as error:
        raise ConversionError(f"{run.folder} does not say its learning rates ({error}); give --config") from None
    return {"adam": adam, "lr_schedule": lr_schedule}


def _ratio(steps: int, total: int) -> float:
    """A `warmup_ratio` that gives this many steps: the plain quotient may come out one short."""
    ratio = steps / total if total else 0.0
    return ratio if int(total * ratio) == steps else (steps + 0.5) / total
