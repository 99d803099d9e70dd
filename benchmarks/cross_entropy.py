#!/usr/bin/env python
"""The head's product and the loss: in chunks of rows, as `internlm_ds.chunked_loss` does, beside whole logits.

`python benchmarks/cross_entropy.py` measures, in turn and every other round backwards, at 8192 tokens x 103 168 words:

* `plain`: logits = hidden @ weightᵀ, `torch.nn.functional.cross_entropy` of them in fp32, backward;
* `plain + metrics`: the same and what training counts beside it (likeliest token, -log p), as without chunks;
* `chunked`: loss, gradients and the same counts, whole logits never being there.

Extra memory is the largest that a contestant had above its inputs (hidden, weight, labels) and the two gradients it
leaves behind: on a CPU resident memory of a process of its own, whose peak is reset before, on a GPU what torch's
allocator handed out. Seconds are those of forward and backward pass, after a small run that starts what needs starting;
seconds of processor, of all threads, are what a busy machine moves least. Equal results: differences of loss, of the
gradients' norms, and of their products with random numbers in units of those norms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pairs
import torch
from device_time import wait

from internlm_ds.model.loss import chunked_cross_entropy, cross_entropy
from internlm_ds.model.metrics import token_values
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear_cross_entropy import PendingLogits

QUICK = {"tokens": 1024, "words": 32768, "hidden": 64, "rounds": 2}
FULL = {"tokens": 8192, "words": 103168, "hidden": 512, "rounds": 3}
ONE = Axis.single("tensor")
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """One contestant's run: seconds, of processor too, bytes above inputs and gradients, and numbers to compare."""

    seconds: float
    cpu_seconds: float
    extra_bytes: int
    numbers: tuple[float, ...]
    products: tuple[float, ...]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    report = {**pairs.facts(args, packages=["torch"]), **compare(args)}
    _show(report)
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    add("--tokens", type=int, help=f"of the micro-batch (default {FULL['tokens']})")
    add("--words", type=int, help=f"of the vocabulary (default {FULL['words']})")
    add("--hidden", type=int, help=f"width of the model (default {FULL['hidden']})")
    add("--rounds", type=int, help=f"default {FULL['rounds']}")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs, medians, ratios to `plain`, and the largest difference between results."""
    runs = pairs.in_turn({name: partial(_run, name, args) for name in CONTESTANTS}, rounds=args.rounds)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    processor = {name: [run.cpu_seconds for run in found] for name, found in runs.items()}
    extra = {name: [float(run.extra_bytes) for run in found] for name, found in runs.items()}
    plain, ours = runs["plain"][0], runs["chunked"][0]
    differences = [
        *(abs(a - b) / abs(a) for a, b in zip(plain.numbers, ours.numbers, strict=True)),
        *(abs(a - b) for a, b in zip(plain.products, ours.products, strict=True)),
    ]
    return {
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "cpu_seconds": {name: statistics.median(found) for name, found in processor.items()},
        "extra_bytes": {name: statistics.median(found) for name, found in extra.items()},
        "seconds_of_plain": {name: pairs.ratio(found, seconds["plain"]) for name, found in seconds.items()},
        "cpu_seconds_of_plain": {name: pairs.ratio(found, processor["plain"]) for name, found in processor.items()},
        "extra_bytes_of_plain": {name: pairs.ratio(found, extra["plain"]) for name, found in extra.items()},
        "largest_difference": max(differences),
    }


def _run(name: str, args: argparse.Namespace) -> Run:
    if args.device == "cuda":
        return measure(name, args)
    # a process of its own, whose peak nobody else moves; forked before torch has computed anything here
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (name, args))


def measure(name: str, args: argparse.Namespace) -> Run:
    """One run of a contestant in this process."""
    loss_of, device = CONTESTANTS[name], torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    _once(loss_of, *_inputs(8, 64, 16, device, dtype))
    inputs = _inputs(args.tokens, args.words, args.hidden, device, dtype)
    wait(device)
    before = _reset_peak(device)
    started, processor = time.perf_counter(), time.process_time()
    loss = _once(loss_of, *inputs)
    wait(device)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    gradients = [x.grad for x in inputs[:2]]
    left = sum(g.numel() * g.element_size() for g in gradients)
    extra = _peak(device) - before - left
    norms, products = zip(*(_numbers(gradient) for gradient in gradients), strict=True)
    return Run(seconds, processor, extra, (loss, *norms), products)


def _inputs(
    tokens: int, words: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator)
    weight = torch.randn(words, hidden, generator=generator).div_(hidden**0.5)
    labels = torch.randint(0, words, (tokens,), generator=generator)
    labels[::16] = -100
    x, weight = (t.to(device, dtype).requires_grad_() for t in (x, weight))
    return x, weight, labels.to(device)


def _once(loss_of: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    loss = loss_of(hidden, weight, labels)
    loss.backward()
    return loss.item()


def _numbers(gradient: torch.Tensor) -> tuple[float, float]:
    """Its norm, and a product with random numbers: of two gradients their difference is about as large as theirs."""
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(gradient.shape[1], generator=generator).to(gradient.device)
    column = torch.randn(len(gradient), generator=generator).to(gradient.device)
    wide = gradient.float()
    norm = wide.norm().item()
    return norm, (column @ (wide @ row)).item() / norm


# ---- contestants ---------------------------------------------------------------------------------------------------


def _plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(hidden @ weight.t(), labels)


def _plain_with_metrics(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    with torch.no_grad():
        token_values(logits, labels)
    return cross_entropy(logits, labels)


def _chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss, _ = chunked_cross_entropy(PendingLogits(hidden, weight, ONE, len(weight)), labels)
    return loss


CONTESTANTS: dict[str, Loss] = {"plain": _plain, "plain + metrics": _plain_with_metrics, "chunked": _chunked}


# ---- device and table ----------------------------------------------------------------------------------------------


def _reset_peak(device: torch.device) -> int:
    """Bytes in use now; the peak starts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A size of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only")


def _show(report: dict[str, Any]) -> None:
    settings = report["settings"]
    print(pairs.headline(report))
    print(
        f"{settings['tokens']} tokens x {settings['words']} words, hidden {settings['hidden']}, {settings['device']}\n"
    )
    rows = [
        (
            name,
            report["seconds"][name],
            str(report["seconds_of_plain"][name]),
            report["cpu_seconds"][name],
            str(report["cpu_seconds_of_plain"][name]),
            report["extra_bytes"][name] / 1e6,
            str(report["extra_bytes_of_plain"][name]),
        )
        for name in CONTESTANTS
    ]
    print(pairs.table(["", "seconds", "of plain", "processor s", "of plain", "extra MB", "of plain"], rows))
    print(f"\nlargest relative difference between plain and chunked: {report['largest_difference']:.1e}")


if __name__ == "__main__":
    raise SystemExit(main())
