"""The hall where all flows start: a file, its overrides and a number of processes become everything known on paper.

`config`, `arch` and `layout` each return what is wrong; here it is raised together. What DeepSpeed cannot do is said by
`translate`, what this machine cannot do by `plan`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from internlm_ds import arch as _arch
from internlm_ds.arch.spec import ModelArch
from internlm_ds.config import Loaded, load
from internlm_ds.config.schema import Config, Leaf
from internlm_ds.errors import ConfigError, LayoutError, Problem
from internlm_ds.layout import ranks, stages
from internlm_ds.layout.batch import BatchPlan
from internlm_ds.layout.ranks import Layout


@dataclass(frozen=True)
class RunSpec:
    """A run on paper.

    Attributes:
        path: The configuration file as it was named.
        text: Its text.
        config: Typed values.
        leaves: Every value with its origin.
        warnings: What may be meant otherwise.
        arch: Blueprint of the model; None for registered model types and families without one.
        layout: Who does what among the processes.
        batch: What a step consists of.
    """

    path: str
    text: str
    config: Config
    leaves: tuple[Leaf, ...]
    warnings: tuple[str, ...]
    arch: ModelArch | None
    layout: Layout
    batch: BatchPlan


def resolve(path: str | os.PathLike[str], *, overrides: Sequence[str] = (), world_size: int | None) -> RunSpec:
    """Load a configuration and lay it out on `world_size` processes, or on as few as it allows.

    Args:
        path: An InternLM Python configuration.
        overrides: Arguments of `--set`.
        world_size: Number of processes; None: the smallest that the configuration allows.
    Raises:
        ConfigError: All problems of the file, the model's sizes and the layout, together.
    """
    loaded = load(path, overrides)
    config, line_of = loaded.config, _line_of(loaded.leaves)
    if config is None:
        raise ConfigError(loaded.problems, path=loaded.path)
    if world_size is None:
        world_size = ranks.smallest_world_size(config.parallel)
    wrong = frozenset(problem.key.removesuffix(".size") for problem in loaded.problems)
    layout, found = _lay_out(config, wrong, world_size=world_size, line_of=line_of)
    found = [*_arch.check(config, line_of=line_of), *found]
    problems = [*loaded.problems, *(_located(p, loaded) for p in _worth_saying(found, wrong, loaded))]
    if problems or layout is None:
        raise ConfigError(problems, path=loaded.path)
    return RunSpec(
        path=loaded.path,
        text=loaded.text,
        config=config,
        leaves=loaded.leaves,
        warnings=tuple(loaded.warnings),
        arch=_arch.build(config),
        layout=layout,
        batch=BatchPlan.from_config(config.data, data_size=layout.data),
    )


_RESTS_ON = {
    "data.rampup_batch_size": ("data.micro_num", "parallel.pipeline"),
    "data.micro_num": ("parallel.pipeline", "model.num_chunks"),
    "data.valid_micro_num": ("parallel.pipeline", "model.num_chunks", "data.micro_num"),
    "parallel.zero1": ("parallel.tensor", "parallel.pipeline"),
    "parallel.pipeline": ("parallel.tensor", "model.num_layers", "model.num_chunks"),
    "model.num_chunks": ("model.num_layers",),
    "model.num_attention_heads": ("model.hidden_size",),
    "model.num_kv_attention_heads": ("model.num_attention_heads",),
    "internlm_ds.pipeline_bounds": ("model.num_layers", "parallel.pipeline", "model.num_chunks"),
}
"""What a key is compared with when it must divide; where that is wrong, only a stand-in would be compared."""


def _worth_saying(found: list[Problem], wrong: frozenset[str], loaded: Loaded) -> list[Problem]:
    """Leave out what is wrong by itself already, or only beside a stand-in, or because of the value it copies."""
    keys = {problem.key for problem in found}
    copies = {leaf.key for leaf in loaded.leaves if leaf.origin == "derived"}
    return [
        problem
        for problem in found
        if problem.key not in wrong
        and not any(key in wrong for key in _RESTS_ON.get(problem.key, ()))
        and not (problem.key == "data.valid_micro_num" and problem.key in copies and "data.micro_num" in keys)
    ]


def _lay_out(
    config: Config, wrong: frozenset[str], *, world_size: int, line_of: Callable[[str], int | None]
) -> tuple[Layout | None, list[Problem]]:
    """The layout and everything that does not divide. Where it does not come out, the rest is checked without it."""
    layout, problems = ranks.solve(
        config.parallel, world_size=world_size, num_chunks=config.model.num_chunks, line_of=line_of
    )
    tensor = _tensor_problem(config, wrong, world_size=world_size, line_of=line_of)
    if tensor is not None:
        problems = [tensor, *(p for p in problems if p.key != "parallel.tensor")]
    paper = layout or Layout(pipe=max(1, config.parallel.pipeline.size), chunks=max(1, config.model.num_chunks))
    problems += _stage_problems(config, paper, line_of=line_of)
    try:
        batch = BatchPlan.from_config(config.data, data_size=paper.data)
    except LayoutError as error:
        return layout, [*problems, Problem("data.rampup_batch_size", str(error), has_value=False)]
    problems += batch.check(paper, valid_micro_num=config.data.valid_micro_num, line_of=line_of)
    return layout, _merged(problems)


def _tensor_problem(
    config: Config, wrong: frozenset[str], *, world_size: int, line_of: Callable[[str], int | None]
) -> Problem | None:
    """All that `parallel.tensor` must divide at once, so that what is possible is possible in every respect."""
    tensor, pipe = config.parallel.tensor.size, config.parallel.pipeline.size
    if world_size < 1 or tensor < 1:
        return None
    constraints = [("the world size", world_size)]
    if not wrong & {"model.hidden_size", "model.mlp_ratio"}:
        constraints += [(name, size) for name, size in _arch.tensor_divisors(config) if name not in wrong]
    if config.parallel.sequence_parallel and not wrong & {"data.micro_bsz", "data.seq_len"}:
        constraints.append(("data.micro_bsz * data.seq_len", config.data.micro_bsz * config.data.seq_len))
    broken = [f"{name} = {size}" for name, size in constraints if size % tensor]
    if not broken:
        return None
    left = world_size // pipe if world_size % pipe == 0 else world_size
    possible = ranks.divisors(math.gcd(left, *(size for _, size in constraints)))
    listed = f"{', '.join(broken[:-1])} and {broken[-1]}" if len(broken) > 1 else broken[0]
    message = f"must divide {listed}; possible here: {', '.join(map(str, possible))}"
    line = line_of("parallel.tensor.size") or line_of("parallel.tensor")
    return Problem("parallel.tensor", message, tensor, line)


def _stage_problems(config: Config, layout: Layout, *, line_of: Callable[[str], int | None]) -> list[Problem]:
    """What keeps the layers from being cut: `internlm_ds.pipeline_bounds` where it is given, else even division."""
    bounds, layers = config.internlm_ds.pipeline_bounds, config.model.num_layers
    count = layout.pipe * layout.chunks
    if bounds is None or count > layers:
        return stages.check(layers, layout, line_of=line_of)
    if len(bounds) == count + 1 and bounds[-1] == layers:
        return []
    key = "internlm_ds.pipeline_bounds"
    even = [layers * i // count for i in range(count + 1)]
    message = f"needs {count + 1} borders from 0 to model.num_layers = {layers} for {count} stage(s), e.g. {even}"
    return [Problem(key, message, list(bounds), line_of(key))]


def _merged(problems: list[Problem]) -> list[Problem]:
    """One problem a key."""
    found: dict[str, Problem] = {}
    for problem in problems:
        before = found.get(problem.key)
        if before is None:
            found[problem.key] = problem
        elif before.message != problem.message:
            found[problem.key] = replace(before, message=f"{before.message}; and {problem.message}")
    return list(found.values())


def _line_of(leaves: Sequence[Leaf]) -> Callable[[str], int | None]:
    """Line of a dotted key, by the name InternLM gives it or as the file spells it."""
    lines = {name: leaf.line for leaf in leaves for name in (leaf.key, leaf.source)}
    return lines.get


def _located(problem: Problem, loaded: Loaded) -> Problem:
    """Add what a line alone does not tell: the base file it is in, or that `--set` gave the value."""
    for leaf in loaded.leaves:
        if problem.key in (leaf.key, leaf.source, leaf.key.removesuffix(".size")):
            if leaf.origin == "override":
                return replace(problem, line=None, message=f"{problem.message} (given with --set)")
            return replace(problem, path=leaf.file) if problem.line else problem
    return problem
