#!/usr/bin/env python
"""Attention over packed segments: every backend that runs here, in turn, forward and backward.

`python benchmarks/attention.py --device {cpu,cuda}` times, every other round backwards:

* each flash-attn that is installed, torch's varlen attention, SDPA by cuDNN's kernels (CUDA only);
* `sdpa`: torch's scaled_dot_product_attention as `internlm_ds.attention.sdpa` calls it, and its two ways for segments
  of unequal length, `one by one` and `in batches`, by themselves;
* two peers: `slices` (one SDPA call for each slice of the tensors, as one would write it first) and `mask` (one call
  with a mask of all tokens by all tokens).

Segments are equal, or packed: lengths of samples, drawn once (log-normal). Grouped-query cases have fewer key/value
heads. Before anything is timed all outputs are compared.

TFLOPS = operations / seconds / 10^12 with 4 N D sum(L (L + 1) / 2) operations forward (N heads of width D, segments of
L tokens, the causal half only, products only) and 2.5 times as many backward (five products instead of two).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pairs
import torch
from device_time import elapsed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from internlm_ds.attention import flash, kernels, reference, sdpa, varlen
from internlm_ds.attention.kernels import Attend, Setting, Unfit
from internlm_ds.attention.segments import Segments

BACKWARD = 2.5
SIZES = {  # tokens, heads, key/value heads when grouped, head width, timed calls per round
    ("cpu", True): (512, 4, 2, 32, 1),
    ("cpu", False): (2048, 8, 2, 64, 2),
    ("cuda", True): (4096, 32, 8, 128, 2),
    ("cuda", False): (16384, 32, 8, 128, 5),
}
TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 7e-2,
    torch.float16: 9e-3,
}  # two units in the last place of an output of 4
MASK_UP_TO = 4096  # tokens; a larger mask takes minutes, or does not fit


@dataclass(frozen=True)
class Case:
    """What is attended.

    Attributes:
        name: As the table calls it.
        lengths: Of the segments.
        heads, kv_heads, head_dim: N, G, D.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def operations(self) -> int:
        """Of the forward pass."""
        return 4 * self.heads * self.head_dim * sum(n * (n + 1) // 2 for n in self.lengths)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu runs anywhere")
        return 2
    args.rounds = args.rounds or (2 if args.quick else 7)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    report: dict[str, Any] = {**pairs.facts(args, packages=["torch"]), "left_out": {}, "cases": []}
    if args.device == "cuda":
        report["machine"] += f", {torch.cuda.get_device_name()}"
    print(f"{pairs.headline(report)}, {args.dtype}, {torch.get_num_threads()} CPU thread(s)\n")
    for case in cases(args):
        found = measure(case, args, report["left_out"])
        report["cases"].append(found)
        print(_shown(found), end="\n\n", flush=True)
    for name, why in report["left_out"].items():
        print(f"left out: {name}: {why}")
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--quick", action="store_true", help="small sizes, two rounds: does it run?")
    add("--rounds", type=int, help="default 7")
    add("--deterministic", action="store_true", help="gradients must be the same bits each time")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def cases(args: argparse.Namespace) -> list[Case]:
    """Equal segments, and samples of about 200 and about 10 tokens; all heads, and grouped ones."""
    tokens, heads, kv_heads, head_dim, _ = SIZES[args.device, args.quick]
    equal = tokens // 4
    return [
        Case(f"{name}, {heads} heads" + f" / {groups}" * (groups < heads), lengths, heads, groups, head_dim)
        for groups in (heads, kv_heads)
        for name, lengths in (
            (f"4 x {equal} tokens", (equal,) * 4),
            ("packed, about 200", drawn(tokens, 200)),
            ("packed, about 10", drawn(tokens, 10)),
        )
    ]


def drawn(tokens: int, typical: int) -> tuple[int, ...]:
    """Lengths of samples whose sum is `tokens`; the median sample has `typical`."""
    rng, lengths = random.Random(0), []
    while tokens > 0:
        lengths.append(min(tokens, max(1, round(typical * rng.lognormvariate(0, 0.75)))))
        tokens -= lengths[-1]
    return tuple(lengths)


def measure(case: Case, args: argparse.Namespace, left_out: dict[str, str]) -> dict[str, Any]:
    """Milliseconds, ratios and TFLOPS of every contestant."""
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    borders = torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)
    segments = Segments(borders)
    generator = torch.Generator(device).manual_seed(0)
    qkv = [
        torch.randn(segments.num_tokens, heads, case.head_dim, device=device, generator=generator)
        .to(dtype)
        .requires_grad_()
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    running = contestants(case, args, left_out)
    expected = running["sdpa"](*qkv, segments)
    for name, attend in running.items():
        out = attend(*qkv, segments)
        difference = (out - expected).abs().max().item()
        assert difference <= TOLERANCE[dtype], f"{name} differs by {difference}"
        out.backward(out.detach())  # starts what needs starting
    timed: dict[str, list[tuple[float, float]]] = {name: [] for name in running}

    def once(name: str) -> float:
        forward, both = _seconds(running[name], qkv, segments, calls=SIZES[args.device, args.quick][4])
        timed[name].append((forward, both))
        return both

    pairs.in_turn({name: lambda name=name: once(name) for name in running}, rounds=args.rounds)
    return {"case": case.name, "segments": len(case.lengths), "backends": _figures(case, timed)}


def _figures(case: Case, timed: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, times in timed.items():
        forward, both = (statistics.median(figures) for figures in zip(*times, strict=True))
        found[name] = {
            "forward_ms": forward * 1e3,
            "both_ms": both * 1e3,
            "of_sdpa": pairs.ratio([b for _, b in times], [b for _, b in timed["sdpa"]]),
            "forward_tflops": case.operations / forward / 1e12,
            "tflops": case.operations * (1 + BACKWARD) / both / 1e12,
        }
    return found


def contestants(case: Case, args: argparse.Namespace, left_out: dict[str, str]) -> dict[str, Attend]:
    """What runs here, by name; why the others do not goes to `left_out`."""
    dtype = getattr(torch, args.dtype)
    setting = Setting.of(args.device, dtype, case.head_dim, deterministic=args.deterministic)
    found: dict[str, Attend] = {}
    for generation in flash.GENERATIONS:
        try:
            found[generation.name] = flash.find(setting, [generation])[0].attend
        except Unfit as why:
            left_out[generation.name] = str(why)
    try:
        found["varlen"] = varlen.find(setting)
    except Unfit as why:
        left_out["varlen"] = str(why)
    found["sdpa"] = sdpa.attend
    if args.device == "cuda":
        try:
            kernels.trial(cudnn, setting)
            found["sdpa by cuDNN"] = cudnn
        except Exception as error:  # no cuDNN, or one that is too old
            left_out["sdpa by cuDNN"] = kernels.on_one_line(error)
    if len(set(case.lengths)) > 1:
        found |= {"one by one": sdpa.one_by_one, "in batches": sdpa.in_batches, "slices": slices}
        if sum(case.lengths) <= MASK_UP_TO:
            found["mask"] = masked
    return found


def slices(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A peer: one call for each slice."""
    parts = []
    for start, length in zip(segments.borders, segments.lengths):
        part = (x[start : start + length].transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(*part, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def cudnn(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, dropout: float = 0.0) -> Tensor:
    """SDPA as we call it, by cuDNN's kernels, which torch does not take first on its own."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa.attend(q, k, v, segments, dropout=dropout)


def masked(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """A peer: one call with the whole mask, which is made once."""
    mask = segments.shared("mask", lambda: reference.visible(segments, q.device))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _seconds(attend: Attend, qkv: list[Tensor], segments: Segments, *, calls: int) -> tuple[float, float]:
    """A forward pass, and a forward and a backward pass: the mean of some calls of each."""

    def both() -> None:
        for x in qkv:
            x.grad = None
        out = attend(*qkv, segments)
        out.backward(out.detach())

    device = qkv[0].device
    if device.type == "cuda":
        both()  # memory of the last contestant's shapes is handed on
    return elapsed(lambda: attend(*qkv, segments), device, times=calls), elapsed(both, device, times=calls)


def _shown(found: dict[str, Any]) -> str:
    head = [f"{found['case']} ({found['segments']} segments)", "forward ms", "TFLOPS", "both ms", "TFLOPS", "of sdpa"]
    rows = [
        [name, each["forward_ms"], each["forward_tflops"], each["both_ms"], each["tflops"], str(each["of_sdpa"])]
        for name, each in found["backends"].items()
    ]
    return pairs.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
