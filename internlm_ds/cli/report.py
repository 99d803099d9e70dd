"""`internlm-ds report RUN_DIR… [-o FILE.html]`: one page with the curves of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="run directory of a training run, or its metrics.jsonl"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE.html", help="the page; default: report.html in the first run directory"
    )


def run(args: argparse.Namespace) -> int:
    from internlm_ds.monitor.report import render

    first = Path(args.run_dirs[0])
    folder = first.parent if first.name == "metrics.jsonl" else first
    print(render(args.run_dirs, args.output or folder / "report.html"))
    return 0
