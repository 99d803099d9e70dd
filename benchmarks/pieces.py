#!/usr/bin/env python
"""RMSNorm, SwiGLU and rotary beside their plain forms, forward and backward pass, in turn.

`python benchmarks/pieces.py` prints milliseconds and the ratio to the plain form of the same round: of the processor's
time on a CPU (one thread; what a busy machine moves least), of the clock's on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import pairs
import torch
from device_time import busy
from torch.nn.functional import rms_norm

from internlm_ds.model.mlp import swiglu, swiglu_plain
from internlm_ds.model.norm import RmsNorm, rms_norm_plain
from internlm_ds.model.rotary import rotate, rotate_plain

EPS = 1e-6
Piece = Callable[[], torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.tokens, args.hidden, args.width, args.rounds, args.times = 128, 128, 384, 3, 2
    torch.set_num_threads(1)
    rows, found = [], {}
    for piece, contestants in _pieces(args).items():
        taken = pairs.in_turn({n: _timed(f, args) for n, f in contestants.items()}, rounds=args.rounds)
        for name, (ms, of_plain) in pairs.beside(taken, "plain").items():
            found[f"{piece}: {name}"] = {"ms": ms, "of_plain": of_plain}
            rows.append((f"{piece}: {name}", ms, str(of_plain)))
    report = {**pairs.facts(args, packages=["torch"]), "pieces": found}
    print(pairs.headline(report))
    print(f"{args.tokens} tokens, hidden {args.hidden}, MLP {args.width}, {args.device}, {args.dtype}\n")
    print(pairs.table(["", "ms", "of plain"], rows))
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--quick", action="store_true", help="small sizes, seconds instead of minutes")
    add("--tokens", type=int, default=1024, help="default %(default)s")
    add("--hidden", type=int, default=512, help="width of the model (default %(default)s)")
    add("--width", type=int, default=1536, help="of the MLP (default %(default)s)")
    add("--head", type=int, default=64, help="width of a head (default %(default)s)")
    add("--rounds", type=int, default=15, help="default %(default)s")
    add("--times", type=int, default=5, help="of each contestant in a round (default %(default)s)")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


def _timed(piece: Piece, args: argparse.Namespace) -> pairs.Measure:
    """Milliseconds of a forward and backward pass."""
    grad = torch.randn_like(piece())
    return lambda: busy(lambda: piece().backward(grad), args.device, times=args.times) * 1e3


def _pieces(args: argparse.Namespace) -> dict[str, dict[str, Piece]]:
    dtype = getattr(torch, args.dtype)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device=args.device, dtype=dtype, requires_grad=True)

    x, gate, up = normal(args.tokens, args.hidden), normal(args.tokens, args.width), normal(args.tokens, args.width)
    qk = normal(args.tokens, 2, args.hidden // args.head, args.head)
    tables = normal(args.tokens, args.head // 2).detach().cos(), normal(args.tokens, args.head // 2).detach().sin()
    norm = RmsNorm(args.hidden, eps=EPS, dtype=dtype, weight_dtype=dtype).to(args.device)
    torch.nn.init.ones_(norm.weight)
    return {
        "RMSNorm": {
            "plain": lambda: rms_norm_plain(x, norm.weight, EPS, dtype),
            "ours": lambda: norm(x),
            "torch's rms_norm": lambda: rms_norm(x, (args.hidden,), norm.weight, EPS),
        },
        "SwiGLU": {"plain": lambda: swiglu_plain(gate, up), "ours": lambda: swiglu(gate, up)},
        "rotary": {"plain": lambda: rotate_plain(qk, tables), "ours": lambda: rotate(qk, tables)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
