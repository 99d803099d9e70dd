"""`internlm-ds data convert`: options and printing; the work is `data.foreign`'s."""

from __future__ import annotations

import argparse
import sys

from internlm_ds.cli.preprocess_common import FileErrors

FORMATS = ("internlm", "megatron", "numpy", "parquet", "datasets")


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="a file, what several files' names begin with, or a folder of them"
    )
    parser.add_argument("target", metavar="DST", help="the same of the result")
    for option, which in (("--from", "SRC"), ("--to", "DST")):
        about = f"format of {which}: {', '.join(FORMATS)} (default: told from its name)"
        parser.add_argument(option, dest=f"{option[2:]}_format", choices=FORMATS, metavar="FORMAT", help=about)
    about = "type of the ids in DST: uint16 (ids below 65536), int32, int64 (default: int32)"
    parser.add_argument("--dtype", choices=["uint16", "int32", "int64"], default="int32", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Convert and print a line for each file.

    Raises:
        InternlmDsError: What `guarded` prints.
    """
    from internlm_ds.data.foreign.convert import convert, summary
    from internlm_ds.preprocess.progress import Progress

    shown: list[Progress] = []

    def progress(done: int, total: int, tokens: int) -> None:
        if not shown:
            shown.append(Progress(total, stream=sys.stderr))
        shown[0].update(done, tokens=tokens)

    with FileErrors():
        results = convert(
            args.source,
            args.target,
            source_format=args.from_format,
            target_format=args.to_format,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    for one in shown:
        one.finish()
    print("\n".join(summary(results)))
    return 0
