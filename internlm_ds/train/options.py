"""The options of `launch/pretrain.py`, as typed by a user or added by a launcher. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SEED = 1024


@dataclass(frozen=True)
class Options:
    """What the command line said. See `parser` for the meaning of each."""

    config: str
    set: tuple[str, ...] = ()
    overlay: tuple[str, ...] = ()
    run_dir: str | None = None
    launcher: str = "auto"
    seed: int = DEFAULT_SEED
    backend: str | None = None
    host: str | None = None
    port: int | None = None
    local_rank: int = -1
    world_size: int | None = None
    dry_run: bool = False
    profile: bool = False


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line; exits with code 2 and a usage line on wrong usage."""
    args = vars(parser().parse_args(argv))
    args["set"], args["overlay"] = tuple(args["set"]), tuple(args["overlay"])
    return Options(**args)


def parser() -> argparse.ArgumentParser:
    # without allow_abbrev=False an option a launcher adds could be taken for a prefix of ours
    p = argparse.ArgumentParser(
        prog="pretrain.py",
        allow_abbrev=False,
        description="Train an InternLM configuration, unchanged, on DeepSpeed.",
        epilog="Start it with `deepspeed`, `torchrun`, `srun`, or plain `python` for one process.",
    )
    add = p.add_argument
    add("--config", required=True, metavar="FILE", help="an InternLM Python configuration")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override by dotted path or top-level constant")
    add(
        "--overlay",
        action="append",
        default=[],
        metavar="FILE",
        help="DeepSpeed JSON or YAML merged over the translation",
    )
    add("--run-dir", metavar="DIR", help="where this run writes (default RUN/JOB_NAME/launch time)")
    add("--launcher", choices=["auto", "deepspeed", "torch", "slurm"], default="auto", help="who started the processes")
    add("--seed", type=int, default=DEFAULT_SEED, help="seed of weights and random streams (default %(default)s)")
    add("--backend", choices=["nccl", "gloo"], help="collectives (default: nccl with a GPU, gloo without)")
    add("--host", help="address of rank 0")
    add("--port", type=int, help="port of rank 0")
    add("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    add("--world-size", "--world_size", type=int, metavar="N", help="ranks to plan for, with --dry-run")
    add("--dry-run", action="store_true", help="load, translate, plan, print, stop: no process group")
    add("--profile", action="store_true", help="trace a few steps into the run directory")
    return p
