#!/usr/bin/env python
"""How fast a training step is, beside peers that are measured in turn: a plain PyTorch loop, Hugging Face's Llama under
DeepSpeed ZeRO-1, and torchtitan where it is installed.

`python benchmarks/step.py --device cpu` trains 8 layers of width 512 in fp32 on one rank, on two data-parallel ranks
(ZeRO-1) and in two pipeline stages; `--quick` the same with a tiny model; `--device cuda` 1.3B whole and layers shaped
like a 7B model's in bfloat16. Cores are divided among the ranks of a contestant.

Two contestants at a time take turns, A B A B …; a ratio is the median over rounds of the ratio within a round. Flops
are InternLM's count: with a = 3 passes, 4 where blocks are recomputed (hardware flops), `a·((8 + 6·mlp/h)·B·s·h² +
4·B·s²·h)·L + 6·B·s·h·V`. MFU and HFU divide by the data sheet's peak; beside them stands the share of the rate at
which this device multiplied matrices of the model's own shape in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pairs import Ratio, facts, headline, table, write_json
from step_arena import Arena, ContestantFailed, Figures
from step_facts import Facts, Sizes

from internlm_ds.plan.compute import flops_per_step

PLAIN = "plain PyTorch"

CPU = Sizes("8 layers of 512", hidden=512, layers=8, heads=8, mlp=1536, vocab=8192, seq=512, rows=2, micro_batches=4)
TINY = Sizes("4 layers of 64", hidden=64, layers=4, heads=4, mlp=256, vocab=512, seq=64, rows=2, micro_batches=4)


def gpu_sizes() -> list[Sizes]:
    """1.3B whole, then 7B-shaped layers, 4 and 8 of them, by sequence length, unpacked and packed."""
    half = {"dtype": "bfloat16", "micro_batches": 4}
    sizes = [Sizes("1.3B", 2048, 24, 16, 5632, 32000, seq=2048, rows=4, **half)]
    for layers in (4, 8):
        seven = Sizes(f"7B × {layers}", 4096, layers, 32, 11008, 103168, seq=2048, rows=4, **half)
        for seq in (2048, 4096, 8192):
            one = replace(seven, seq=seq, rows=8192 // seq)
            sizes += [one, replace(one, packed=True)]
    return sizes


@dataclass(frozen=True)
class Pair:
    """A contestant, and whom it is compared with."""

    name: str
    facts: Facts
    over: str


def contestants(sizes: Sizes, device: str, *, compiled: bool) -> tuple[dict[str, Facts], list[Pair]]:
    """The peers that others are compared with, and the comparisons."""
    plain = Facts("plain", sizes, device)
    alone = Facts("ours", sizes, device)
    bases = {PLAIN: plain}
    pairs = [
        Pair("Hugging Face + DeepSpeed ZeRO-1", Facts("hf", sizes, device), PLAIN),
        Pair("internlm-ds", alone, PLAIN),
    ]
    titan = Facts("torchtitan", sizes, device)
    if find_spec("torchtitan"):
        pairs.append(Pair("torchtitan", titan, PLAIN))
    if compiled:
        bases["plain PyTorch, compiled"] = replace(plain, compile=True)
        pairs.append(Pair("internlm-ds, compiled", replace(alone, own="compile=True"), "plain PyTorch, compiled"))
        if find_spec("torchtitan") and device == "cuda":  # its blocks are compiled where they are sharded
            pairs.append(Pair("torchtitan, compiled", replace(titan, compile=True), "plain PyTorch, compiled"))
    if device == "cpu":
        stages = replace(alone, pipe=2)
        bases["2 stages, 1F1B"] = stages
        pairs += [
            Pair("2 ranks, ZeRO-1", replace(alone, data=2), PLAIN),
            Pair("2 stages, 1F1B", stages, PLAIN),
            Pair("2 stages, zero bubble", replace(stages, own="pipeline_schedule='zb-h1'"), "2 stages, 1F1B"),
            Pair("2 stages, 2 chunks", replace(stages, chunks=2), "2 stages, 1F1B"),
        ]
    return bases, pairs


# ---- the report ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.steps is None:
        args.steps = 3 if args.quick else 1 if args.device == "cpu" else 5
    if args.threads is None:
        # threads of a tiny model wait for each other longer than they compute
        args.threads = 1 if args.quick else _cores()
    report = {
        **facts(args, packages=["torch", "deepspeed", "transformers", "torchtitan"]),
        "cases": [],
    }
    print(headline(report), flush=True)
    for sizes in _chosen(args):
        arena = Arena(args)
        with contextlib.closing(arena):
            report["cases"].append(measure(sizes, arena))
    write_json(report, args.json)
    failed = any("failed" in row for case in report["cases"] for row in case["rows"].values())
    return int(failed and args.quick)  # with real sizes a peer may run out of memory


def measure(sizes: Sizes, arena: Arena) -> dict[str, Any]:
    """All comparisons of one size; prints them as they come."""
    args = arena.args
    bases, pairs = contestants(sizes, args.device, compiled=args.compile)
    rate, name = matmul_rate(sizes, arena), f"{sizes.name}, {'packed ' if sizes.packed else ''}{sizes.seq}"
    print(f"\n{name}: {sizes.tokens} tokens a step, {sizes.dtype}; matrix products at {rate / 1e9:.0f} GFLOP/s\n")
    case: dict[str, Any] = {"sizes": vars(sizes), "matmul_flops": rate, "rows": {}}
    shown: set[str] = set()
    rows = []
    pairs = [pair for pair in pairs if not args.only or args.only in pair.name]
    for pair, following in zip_longest(pairs, pairs[1:]):
        if args.quick and following:
            arena.start(following.facts)  # loads its libraries meanwhile: times of a tiny model say nothing anyway
        try:
            speed, it, base = arena.compare(pair.facts, bases[pair.over])
        except ContestantFailed as error:
            arena.stop(pair.facts)
            print(f"{pair.name}: failed\n{error}", file=sys.stderr, flush=True)
            case["rows"][pair.name] = {"failed": str(error)}
            continue
        if pair.over not in shown and pair.over not in case["rows"]:
            rows.append(_row(case, pair.over, base, sizes, rate, None))
        shown.add(pair.over)
        rows.append(_row(case, pair.name, it, sizes, rate, (speed, pair.over)))
        print(f"  {pair.name}: {speed} of {pair.over}", flush=True)
        if pair.facts not in bases.values():
            arena.stop(pair.facts)
    head = ["contestant", "tokens/s", "MFU", "HFU", "of matmul", "memory MB", "loss", "speed (min-max)", "times"]
    print("\n" + table(head, rows), flush=True)
    return case


def _row(
    case: dict[str, Any], name: str, figures: Figures, sizes: Sizes, rate: float, compared: tuple[Ratio, str] | None
) -> list[object]:
    seconds = statistics.median(figures.seconds)
    flops = _flops(sizes) / seconds
    peak = _data_sheet_peak(case)
    values = {
        "tokens_per_s": sizes.tokens / seconds,
        "step_s": seconds,
        # nothing is recomputed here, so the hardware does what the model asks for
        "mfu": None if peak is None else flops / peak,
        "hfu": None if peak is None else flops / peak,
        "of_matmul": flops / rate,
        "peak_mb": [max(rank) for rank in zip(*figures.peaks, strict=True)],
        "loss": figures.loss,
    }
    if compared is not None:
        values["speed"], values["over"] = compared
    case["rows"][name] = values
    shares = ["-" if values[key] is None else f"{values[key]:.1%}" for key in ("mfu", "hfu")]
    memory = " + ".join(f"{mb:.0f}" for mb in values["peak_mb"])
    told = [str(compared[0]), compared[1]] if compared else ["1", ""]
    return [
        name,
        values["tokens_per_s"],
        *shares,
        f"{values['of_matmul']:.1%}",
        memory,
        f"{figures.loss:.3f}",
        *told,
    ]


def _flops(sizes: Sizes) -> float:
    return flops_per_step(
        checkpoint=False,
        seq_len=sizes.seq,
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        vocab_size=sizes.vocab,
        global_batch_size=sizes.rows * sizes.micro_batches,
        mlp_ratio=sizes.mlp / sizes.hidden,
    )


def _data_sheet_peak(case: dict[str, Any]) -> float | None:
    if case["sizes"]["dtype"] != "bfloat16":
        return None
    import torch

    from internlm_ds.train.metrics import device_peak_flops

    return device_peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def matmul_rate(sizes: Sizes, arena: Arena) -> float:
    """Flops per second of the device's matrix products in the model's shape: the best of three turns."""
    facts = Facts("matmul", sizes, arena.args.device)
    contestant = arena.start(facts)
    contestant.prepare(warm_up=arena.args.warm_up)
    rate = max(contestant.steps(1)[0]["loss"] for _ in range(3))
    arena.stop(facts)
    return rate


def _chosen(args: argparse.Namespace) -> list[Sizes]:
    if args.device == "cpu":
        return [TINY if args.quick else CPU]
    sizes = gpu_sizes()
    return [replace(TINY, dtype="bfloat16")] if args.quick else sizes if args.size is None else [sizes[args.size]]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default %(default)s)")
    add("--quick", action="store_true", help="a tiny model: does everything run?")
    add("--rounds", type=int, default=3, help="of A B (default %(default)s)")
    add("--steps", type=int, help="of each in a round; their median counts")
    add("--warm-up", type=int, default=2, help="steps before the first round (default %(default)s)")
    add("--threads", type=int, help="of a contestant, divided among its ranks (default: cores; 1 with --quick)")
    add("--only", metavar="TEXT", help="only contestants whose name contains this")
    add("--size", type=int, metavar="N", help="with --device cuda: only the N-th size, from 0")
    add("--compile", action="store_true", help="also compiled against compiled")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
