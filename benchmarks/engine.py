#!/usr/bin/env python
"""What the engine costs beside the model it runs, measured side by side in one process, A B C A B C ….

`python benchmarks/engine.py` compares, on one rank, a plain PyTorch loop, our engine, and DeepSpeed's own
`PipelineEngine` with its schedule: the same layers, micro-batches and optimizer. A step of few and one of many
micro-batches are timed; the difference is the time of a micro-batch, what remains is the step's own. Then, on two
data-parallel ranks, which share of a step reduces gradients, gathers weights, and compares copies
(`internlm_ds.guard.drift_every`).

On a shared machine only the ratios within one run count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks
from internlm_ds.verify.case import Case

TWO_RANKS = Layout(data=2, zero=2)
SECONDS = 1e6  # microseconds in one


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: Of A B C.
        steps: Of each in a round; their median counts.
        few, many: Micro-batches of the two kinds of step.
    """

    rounds: int
    steps: int
    few: int
    many: int


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.rounds, args.steps, args.many, args.layers = 3, 3, 20, 2
    effort = Effort(args.rounds, args.steps, args.few, args.many)
    case = Case(layers=args.layers, hidden=args.hidden, clip=1.0)
    with tempfile.TemporaryDirectory() as folder:
        one = {"layout": Layout(), "micro_batches": effort.few}
        (alone,) = run_ranks(measure_engines, Layout(), _write(case, folder, **one), effort, timeout_s=1200)
        two = {"layout": TWO_RANKS, "micro_batches": 2 * effort.few}
        shares, _ = run_ranks(measure_reduction, TWO_RANKS, _write(case, folder, **two), effort, timeout_s=1200)
    report = {**_facts(args), "one_rank": alone, "two_ranks": shares}
    _show(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="of A B C (default %(default)s)")
    add("--steps", type=int, default=5, help="of each in a round (default %(default)s)")
    add("--few", type=int, default=4, help="micro-batches of a short step (default %(default)s)")
    add("--many", type=int, default=36, help="micro-batches of a long step (default %(default)s)")
    add("--layers", type=int, default=4, help="of the model (default %(default)s)")
    add("--hidden", type=int, default=32, help="width of the model (default %(default)s)")
    add("--quick", action="store_true", help="few and small, to see that it works")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def _write(case: Case, folder: str, **changes: Any) -> str:
    from dataclasses import replace

    return replace(case, **changes).write(Path(folder))


# ---- one rank --------------------------------------------------------------------------------------------------------


def measure_engines(context, path: str, effort: Effort) -> dict[str, dict[str, float]]:
    """Microseconds of each variant: of a micro-batch, and of the rest of a step."""
    contestants = {
        "plain loop": _plain_loop(context, path),
        "internlm_ds": _our_engine(context, path),
        "DeepSpeed": _deepspeed_engine(context, path),
    }
    data = {count: _data(count) for count in (effort.few, effort.many)}
    times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in contestants for n in data}
    for step in contestants.values():
        step(data[effort.few])  # buffers, states, caches
    for _ in range(effort.rounds):
        for count, micro_batches in data.items():
            for name, step in contestants.items():
                times[name, count].append(_median_time(step, micro_batches, steps=effort.steps))
    result = {}
    # of each round a slope: what slows the machine down for a while slows both ends
    slopes = {
        name: [
            (many - few) / (effort.many - effort.few)
            for few, many in zip(times[name, effort.few], times[name, effort.many], strict=True)
        ]
        for name in contestants
    }
    for name in contestants:
        per_micro_batch = statistics.median(slopes[name])
        rest = statistics.median(times[name, effort.few]) - effort.few * per_micro_batch
        result[name] = {"micro_batch_us": per_micro_batch * SECONDS, "rest_of_step_us": rest * SECONDS}
        in_rounds = zip(slopes[name], slopes["internlm_ds"], strict=True)
        result[name]["micro_batch_over_ours"] = statistics.median(theirs / ours for theirs, ours in in_rounds)
    plain = result["plain loop"]["micro_batch_us"]
    for values in result.values():
        values["overhead_per_micro_batch_us"] = values["micro_batch_us"] - plain
    return result


def _median_time(step: Callable[[list[Any]], None], micro_batches: list[Any], *, steps: int) -> float:
    """Seconds of one step; the first one is not counted: the number of micro-batches may have changed."""
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        step(micro_batches)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _data(count: int) -> list[Any]:
    from internlm_ds.verify.training import micro_batch

    return [micro_batch(0, j, vocab=64) for j in range(count)]


def _loss(logits, labels):
    from internlm_ds.model.loss import cross_entropy

    return cross_entropy(logits, labels[0], label_smoothing=0.0)


def _entries(context, path: str):
    from internlm_ds.runspec import resolve
    from internlm_ds.train.assemble import layer_entries

    spec = resolve(path, world_size=context.layout.world_size)
    return spec, layer_entries(spec, context, seed=7)


def _plain_loop(context, path: str) -> Callable[[list[Any]], None]:
    import torch

    from internlm_ds.engine.build import adamw
    from internlm_ds.model.layers import LanguageModel

    spec, entries = _entries(context, path)
    model = LanguageModel(entries)
    parameters = list(model.parameters())
    optimizer = adamw(parameters, config=spec.config)

    def step(micro_batches: list[Any]) -> None:
        for inputs, labels in micro_batches:
            (_loss(model(*inputs), labels) / len(micro_batches)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _our_engine(context, path: str) -> Callable[[list[Any]], None]:
    return _build_ours(context, path).train_step


def _build_ours(context, path: str):
    from internlm_ds.engine.build import build
    from internlm_ds.train.assemble import stage_bounds
    from internlm_ds.translate import translate

    spec, entries = _entries(context, path)
    return build(
        entries,
        bounds=stage_bounds(spec, entries),
        config=spec.config,
        ds_config=translate(spec).ds_config,
        context=context,
        loss_fn=_loss,
    )


def _deepspeed_engine(context, path: str) -> Callable[[list[Any]], None]:
    """DeepSpeed's engine and schedule as `deepspeed.initialize` makes them, with the same layers and optimizer."""
    import deepspeed

    from internlm_ds.engine.build import adamw, quiet
    from internlm_ds.engine.module import StageModule
    from internlm_ds.train.assemble import stage_bounds
    from internlm_ds.translate import translate

    spec, entries = _entries(context, path)
    with quiet():
        module = StageModule(
            entries,
            bounds=stage_bounds(spec, entries),
            recompute_fraction=0.0,
            layout=context.layout,
            loss_fn=_loss,
        )
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=lambda params: adamw(params, config=spec.config),
            model_parameters=list(module.parameters()),
            config=translate(spec).ds_config,
        )

    def step(micro_batches: list[Any]) -> None:
        if len(micro_batches) != engine.micro_batches:
            engine.set_train_batch_size(engine.micro_batch_size * len(micro_batches))
        engine.train_batch(iter(micro_batches))
        engine.get_global_grad_norm()

    return step


# ---- two ranks -------------------------------------------------------------------------------------------------------


def measure_reduction(context, path: str, effort: Effort) -> dict[str, float]:
    """Microseconds of a short step on two ranks, and of what could be hidden in it or is added by a look at copies."""
    import deepspeed.runtime.zero.stage_1_and_2 as zero
    import torch.distributed as dist

    from internlm_ds.parallel.comm import ProcessComm
    from internlm_ds.parallel.replicas import ReplicaCheck

    engine = _build_ours(context, path)
    micro_batches = _data(effort.few)
    spent: dict[str, list[float]] = {"reduce": [], "gather": [], "step": [], "compare": []}
    engine.optimizer.reduce_gradients = _timed(engine.optimizer.reduce_gradients, spent["reduce"], before=dist.barrier)
    zero.all_gather_dp_groups = _timed(zero.all_gather_dp_groups, spent["gather"])
    replicas = ReplicaCheck(engine.logical_parameters(), comm=ProcessComm())
    step = _timed(engine.train_step, spent["step"], before=dist.barrier)
    compare = _timed(replicas.check, spent["compare"], before=dist.barrier)
    for _ in range(effort.rounds * effort.steps + 1):
        step(micro_batches)
        compare()
    medians = {name: statistics.median(times[1:]) * SECONDS for name, times in spent.items()}
    return {
        "step_us": medians["step"],
        "reduce_gradients_us": medians["reduce"],
        "gather_weights_us": medians["gather"],
        "compare_copies_us": medians["compare"],
        "parameters": sum(p.numel() for p in engine.module.parameters()),
    }


def _timed(function: Callable[..., Any], times: list[float], *, before: Callable[[], Any] = lambda: None):
    """`function`, whose seconds are appended to `times`; `before` is called first and not counted."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        before()
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - started)

    return timed


# ---- what is shown ---------------------------------------------------------------------------------------------------


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    import os

    import deepspeed
    import torch

    return {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        "settings": {name: value for name, value in vars(args).items() if name != "json"},
    }


def _show(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {text}" for name, text in report["versions"].items())
    print(f"{report['date']}, {report['machine']}, {versions}")
    print(f"\n{'one rank':14}{'micro-batch':>16}{'over plain':>16}{'rest of step':>16}")
    for name, values in report["one_rank"].items():
        numbers = (values[key] for key in ("micro_batch_us", "overhead_per_micro_batch_us", "rest_of_step_us"))
        print(f"{name:14}" + "".join(f"{number:>13.0f} µs" for number in numbers))
    two = report["two_ranks"]
    print(f"\ntwo ranks, {two['parameters']} parameters, {report['settings']['few']} micro-batches each")
    for key, text in (
        ("step_us", "step"),
        ("reduce_gradients_us", "reducing gradients"),
        ("gather_weights_us", "gathering weights"),
        ("compare_copies_us", "comparing copies (beside the step)"),
    ):
        print(f"{text:36}{two[key]:>10.0f} µs {100 * two[key] / two['step_us']:>6.1f} %")


if __name__ == "__main__":
    sys.exit(main())
