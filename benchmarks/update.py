#!/usr/bin/env python
"""An update with optimizer states in bf16 beside torch's fused AdamW with fp32 ones, in turn.

`python benchmarks/update.py` prints nanoseconds a parameter and the ratio to fused AdamW of the same round: of the
processor's time on a CPU (one thread), of the clock's on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pairs
import torch
from device_time import busy

from internlm_ds.engine.rounded_adam import RoundedAdamW
from internlm_ds.engine.rounding import Piece

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
PEER = "torch's fused AdamW"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.numel, args.rounds = 2**16, 3
    torch.set_num_threads(1)
    contestants = {
        PEER: _timed(torch.float32, None, args),
        "moments in bf16": _timed(torch.float32, torch.bfloat16, args),
        "moments and masters in bf16": _timed(torch.bfloat16, torch.bfloat16, args),
    }
    taken = pairs.in_turn(contestants, rounds=args.rounds)
    rows, found = [], {}
    for name, (ns, of_peer) in pairs.beside(taken, PEER).items():
        found[name] = {"ns": ns, "of_fused": of_peer}
        rows.append((name, ns, str(of_peer)))
    report = {**pairs.facts(args, packages=["torch"]), "updates": found}
    print(pairs.headline(report))
    print(f"{args.numel} parameters, {args.device}\n")
    print(pairs.table(["", "ns a parameter", "of fused"], rows))
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--quick", action="store_true", help="few parameters, seconds instead of minutes")
    add("--numel", type=int, default=2**23, help="parameters (default %(default)s)")
    add("--rounds", type=int, default=15, help="default %(default)s")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def _timed(masters: torch.dtype, moments: torch.dtype | None, args: argparse.Namespace) -> pairs.Measure:
    """Nanoseconds a parameter of one update; `moments` None: torch's."""
    weights = torch.randn(args.numel, device=args.device).to(masters)
    gradient = torch.randn(args.numel, device=args.device)
    if moments is None:
        theirs = torch.optim.AdamW([weights], fused=True, **SETTINGS)
        weights.grad, update = gradient, theirs.step
    else:
        ours = RoundedAdamW([weights], **SETTINGS, moments_dtype=moments, seed=0)
        ours.pieces = {weights: [Piece("w", args.numel, 0, args.numel, 0)]}

        def update() -> None:
            ours.step(gradients={weights: gradient})

    update()  # makes the moments
    return lambda: busy(update, args.device) / args.numel * 1e9


if __name__ == "__main__":
    raise SystemExit(main())
