"""`internlm-ds verify`: the door to `verify`. Exit code 0 when every claim holds, 1 when one does not."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

# all on this machine, and the model grows with them
MOST_RANKS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=_ranks, metavar="N", help="ranks of the largest layouts; default: all GPUs, or 4 on the CPU"
    )
    parser.add_argument("--quick", action="store_true", help="each layout and each feature once, in under a minute")
    parser.add_argument(
        "--backend", choices=("gloo", "nccl"), help="gloo: CPU; nccl: a GPU per rank; default: nccl where it can be had"
    )


def run(args: argparse.Namespace, *, tamper: Callable[[Any], Any] | None = None) -> int:
    """`tamper` is for tests of this command: what it does to a rank's engine must be found."""
    from internlm_ds.verify.run import verify

    return verify(ranks=args.ranks, quick=args.quick, backend=args.backend, tamper=tamper)


def _ranks(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks from 1 to {MOST_RANKS}")
    return number
