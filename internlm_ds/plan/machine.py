"""Can this machine run it? All obstacles at once, and a command line that works here.

The machine's facts come from outside (`parallel.launch` asks torch), so that this stays paper work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import internlm_ds
from internlm_ds import runspec
from internlm_ds.config import load
from internlm_ds.config.schema import Config
from internlm_ds.errors import ConfigError, InternlmDsError, LayoutError, MachineError, Problem
from internlm_ds.layout.ranks import Layout, divisors
from internlm_ds.plan.memory import DEVICE_OVERHEAD_BYTES
from internlm_ds.plan.report import Plan, describe, gigabytes, stage_memory
from internlm_ds.runspec import RunSpec
from internlm_ds.translate import Translation, translate

# a Python process that has imported torch and deepspeed
HOST_OVERHEAD_BYTES = 600_000_000
FALLBACK_CONFIG = "model_configs/debug_cpu.py"


@dataclass(frozen=True)
class MachineFacts:
    """What a launch has to work with.

    Attributes:
        gpu_count: Devices of this machine; 0 trains on the CPU.
        gpu_memory_bytes: Of the smallest device; 0 without devices.
        host_memory_bytes: Of this machine.
        world_size: Processes of the launch.
        fp16_ok: Whether fp16 can be trained here.
        processes_here: How many of them run on this machine; all when None.
    """

    gpu_count: int
    gpu_memory_bytes: int
    host_memory_bytes: int
    world_size: int
    fp16_ok: bool
    processes_here: int | None = None

    @property
    def local(self) -> int:
        return self.processes_here or self.world_size

    @property
    def words(self) -> str:
        """The machine in a few words."""
        if self.gpu_count:
            devices = f"{self.gpu_count} GPU{'s' * (self.gpu_count > 1)} of {gigabytes(self.gpu_memory_bytes)}"
        else:
            devices = f"no GPU, {gigabytes(self.host_memory_bytes)} of memory"
        return f"{devices}, {_counted(self.world_size)}"


def resolve_here(
    path: str | Path,
    *,
    facts: MachineFacts,
    overrides: Sequence[str] = (),
    overlays: Sequence[str | Path] = (),
    extra: Sequence[Problem] = (),
) -> tuple[RunSpec, Translation]:
    """Resolve and translate for this launch, or say everything that stands in its way at once.

    Args:
        path: The configuration.
        facts: The machine.
        overrides, overlays: As on the command line.
        extra: Obstacles that were found elsewhere (a missing checkpoint); listed with the rest.
    Raises:
        ConfigError: The file is wrong on every machine.
        TranslationError: It asks for what cannot be honoured anywhere.
        MachineError: This machine cannot run it; lists all obstacles and a way that works here.
    """
    spec = _resolve_somewhere(path, overrides=overrides, world_size=facts.world_size)
    translation = translate(spec, overlays=overlays)
    found = [*obstacles(spec, describe(spec, translation), facts), *extra]
    if not found:
        return spec, translation
    raise error_of(path, facts, found, works=suggestion(path, facts, overrides=overrides, overlays=overlays))


def obstacles(spec: RunSpec, plan: Plan, facts: MachineFacts) -> list[Problem]:
    """What keeps a configuration that is sound in itself from running here.

    Args:
        spec: Resolved for any world size; the machine's own is in `facts`.
        plan: Its plan.
        facts: The machine.
    """
    config = spec.config
    assert config is not None, "obstacles need a configuration that loaded"
    return [
        *_precision(spec, config, facts),
        *_attention(spec, config, facts),
        *_devices(facts),
        *_axes(spec, config, facts),
        *_memory(spec, config, plan, facts),
    ]


def suggestion(
    path: str | Path,
    facts: MachineFacts,
    *,
    overrides: Sequence[str] = (),
    overlays: Sequence[str | Path] = (),
) -> str | None:
    """Arguments of `launch/pretrain.py` that work on this machine: the same file with overrides, else a shipped one.

    What is suggested was resolved, translated and planned for this machine before. None when nothing was found.
    """
    for added in _ways(path, facts, overrides):
        if _works(path, facts, [*overrides, *added], overlays):
            options = [f"--config {path}", *(f"--set {item}" for item in (*overrides, *added))]
            return " ".join([*options, *(f"--overlay {file}" for file in overlays)])
    fallback = shipped_config()
    if fallback is not None and _works(fallback, facts, (), ()):
        return f"--config {fallback}"
    return None


def shipped_config() -> str | None:
    """Path of the small configuration that runs anywhere, as one would type it here; None when it was not installed."""
    found = Path(internlm_ds.__file__).resolve().parent.parent / FALLBACK_CONFIG
    return os.path.relpath(found) if found.exists() else None


def error_of(path: str | Path, facts: MachineFacts, found: Sequence[Problem], *, works: str | None) -> MachineError:
    """One error with every obstacle, and under them the arguments that work here."""
    count = len(found)
    lines = [f"{path} cannot run on this machine ({facts.words}): {count} obstacle{'s' * (count > 1)}"]
    lines += [f"  {problem}" for problem in found]
    launcher = "python" if facts.world_size == 1 else "the same launcher with"
    lines.append(f"this works here: {launcher} launch/pretrain.py {works}" if works else "nothing smaller was found")
    error = MachineError("\n".join(lines), path=str(path))
    error.problems = tuple(found)
    return error


# ---- obstacles ------------------------------------------------------------------------------------


def _precision(spec: RunSpec, config: Config, facts: MachineFacts) -> Iterator[Problem]:
    if config.model.dtype == "float16" and not facts.fp16_ok:
        why = "fp16 needs a GPU and this machine has none" if not facts.gpu_count else "this machine cannot train fp16"
        message = f'{why}; "torch.float32" and "torch.bfloat16" run here'
        yield Problem("model.dtype", message, "torch.float16", _line(spec, "model.dtype"))


def _attention(spec: RunSpec, config: Config, facts: MachineFacts) -> Iterator[Problem]:
    named = config.internlm_ds.attention
    if named in ("flash", "varlen") and not facts.gpu_count:
        message = 'needs a GPU and this machine has none; "auto", "sdpa" and "reference" run here'
        yield Problem("internlm_ds.attention", message, named, _line(spec, "internlm_ds.attention"))


def _devices(facts: MachineFacts) -> Iterator[Problem]:
    if facts.gpu_count and facts.local > facts.gpu_count:
        message = f"{facts.local} processes on {facts.gpu_count} GPU{'s' * (facts.gpu_count > 1)}; start one per GPU"
        yield Problem("processes", message, has_value=False)


def _axes(spec: RunSpec, config: Config, facts: MachineFacts) -> Iterator[Problem]:
    pipe, tensor, zero = config.parallel.pipeline.size, config.parallel.tensor.size, config.parallel.zero1.size
    world = facts.world_size
    if world % (pipe * tensor):
        message = f"pipeline {pipe} x tensor {tensor} must divide the number of processes = {world}"
        yield Problem("parallel.pipeline", message, pipe, _line(spec, "parallel.pipeline.size", "parallel.pipeline"))
        return
    data = world // (pipe * tensor)
    if zero > 0 and data % zero:
        good = ", ".join(map(str, divisors(data)))
        message = f"must divide data parallel = {data} ({_counted(world)} here); possible: {good}, or -1 for all of it"
        yield Problem("parallel.zero1", message, zero, _line(spec, "parallel.zero1.size", "parallel.zero1"))


def _memory(spec: RunSpec, config: Config, plan: Plan, facts: MachineFacts) -> Iterator[Problem]:
    if not plan.stages:
        return
    need, parts = _need(spec, config, plan, facts)
    have = facts.gpu_memory_bytes if facts.gpu_count else facts.host_memory_bytes // facts.local
    if need > have:
        where = "its GPU" if facts.gpu_count else "host memory"
        message = f"a rank needs about {gigabytes(need)} ({parts}) and has {gigabytes(have)} in {where}"
        yield Problem("memory", message, has_value=False)


def _need(spec: RunSpec, config: Config, plan: Plan, facts: MachineFacts) -> tuple[int, str]:
    """Bytes that the fullest rank needs here, and its three largest parts in words.

    The plan that was made may be for more ranks than there are: it is made again for the ranks of this launch.
    """
    stages = stage_memory(spec, config, plan.ds_config, layout=_layout_here(config, facts))
    fullest = max(stages, key=lambda stage: stage.peak_bytes)
    need = fullest.peak_bytes
    if not facts.gpu_count:
        need += HOST_OVERHEAD_BYTES - DEVICE_OVERHEAD_BYTES + fullest.host_bytes
    shown = [c for c in fullest.components if c.phase in ("always", fullest.peak_phase)]
    largest = sorted(shown, key=lambda c: -c.nbytes)[:3]
    return need, ", ".join(f"{c.name} {gigabytes(c.nbytes)}" for c in largest)


def _layout_here(config: Config, facts: MachineFacts) -> Layout:
    parallel = config.parallel
    pipe, tensor = parallel.pipeline.size, parallel.tensor.size
    data = max(1, facts.world_size // (pipe * tensor))
    zero = parallel.zero1.size if parallel.zero1.size > 0 else data
    return Layout(pipe=pipe, data=data, tensor=tensor, zero=math.gcd(zero, data), chunks=config.model.num_chunks)


# ---- what would work ------------------------------------------------------------------------------


def _ways(path: str | Path, facts: MachineFacts, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Sets of overrides, the gentlest first."""
    config = load(path, overrides=overrides).config
    if config is None:
        return
    base = [*_axes_overrides(config, facts), *_load_override(config)]
    if config.internlm_ds.attention in ("flash", "varlen") and not facts.gpu_count:
        base.append("internlm_ds.attention=auto")
    dtypes: list[list[str]] = [[]]
    if config.model.dtype == "float16" and not facts.fp16_ok:
        dtypes = [["model.dtype=torch.float32"], ["model.dtype=torch.bfloat16"]]
    recompute = [[], ["model.checkpoint=True"]] if config.model.checkpoint < 1 else [[]]
    batch: list[list[str]] = [[]]
    if config.data.micro_bsz > 1:
        micro_num = config.data.micro_num * config.data.micro_bsz
        batch.append(["data.micro_bsz=1", f"data.micro_num={micro_num}"])
    yield from ([*dtype, *base, *again, *smaller] for smaller in batch for again in recompute for dtype in dtypes)


def _axes_overrides(config: Config, facts: MachineFacts) -> Iterator[str]:
    parallel = config.parallel
    pipe = parallel.pipeline.size
    if facts.world_size % (pipe * parallel.tensor.size):
        pipe = math.gcd(pipe, facts.world_size)
        yield f"parallel.pipeline={pipe}"
    data = facts.world_size // pipe
    if parallel.zero1.size > 0 and data % parallel.zero1.size:
        yield "parallel.zero1=-1"


def _load_override(config: Config) -> Iterator[str]:
    """A checkpoint to start from that does not exist would stop the run again."""
    info = config.ckpt.load_ckpt_info
    folder = info.path.removeprefix("local:") if info is not None else ""
    if folder and ":" not in folder and not os.path.exists(folder):
        yield "ckpt.load_ckpt_info=None"


def _works(path: str | Path, facts: MachineFacts, overrides: Sequence[str], overlays: Sequence[str | Path]) -> bool:
    try:
        spec = runspec.resolve(path, overrides=overrides, world_size=facts.world_size)
        translation = translate(spec, overlays=overlays)
    except InternlmDsError:
        return False
    plan = describe(spec, translation)
    # a device that is shared by several processes is no matter of options
    return not [problem for problem in obstacles(spec, plan, facts) if problem.key != "processes"]


def _resolve_somewhere(path: str | Path, *, overrides: Sequence[str], world_size: int) -> RunSpec:
    """Resolved for the processes there are, else for as many as the configuration asks for.

    Raises:
        ConfigError: It is wrong at its own size, too.
    """
    try:
        return runspec.resolve(path, overrides=overrides, world_size=world_size)
    except (ConfigError, LayoutError) as error:
        try:
            return runspec.resolve(path, overrides=overrides, world_size=None)
        except (ConfigError, LayoutError):
            raise error from None


def _counted(processes: int) -> str:
    return f"{processes} process{'es' * (processes > 1)}"


def _line(spec: RunSpec, *keys: str) -> int | None:
    lines = {leaf.key: leaf.line for leaf in spec.leaves}
    return next((lines[key] for key in keys if lines.get(key)), None)
