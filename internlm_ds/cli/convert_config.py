"""`internlm-ds convert-config`: the door to `translate`. JSON to stdout or a file, the report to stderr or a file."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from internlm_ds.errors import InternlmDsError, Problem, TranslationError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="an InternLM Python configuration")
    parser.add_argument("-o", "--output", metavar="DS.json", help="file for the DeepSpeed JSON (default: stdout)")
    add_run_arguments(parser)
    parser.add_argument("--report", choices=("table", "json", "markdown", "none"), default="table", help="its form")
    parser.add_argument("--report-file", metavar="F", help="file for the report (default: stderr)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes, too."""
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of ranks (default: $WORLD_SIZE, else as few as the configuration needs)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="override a key or a constant")
    parser.add_argument("--overlay", action="append", default=[], metavar="F", help="DeepSpeed keys, JSON or YAML")


def run(args: argparse.Namespace) -> int:
    from internlm_ds import runspec
    from internlm_ds.translate import examine, render

    spec = runspec.resolve(args.config, overrides=args.set, world_size=world_size(args))
    translation, problems = examine(spec, overlays=args.overlay)
    _write_report(args, render.report(translation.notes, args.report), (*spec.warnings, *translation.warnings))
    if problems:
        return _refuse(args, problems, translation.refused_sources, path=str(spec.path))
    text = render.ds_json(translation.ds_config)
    if args.output:
        write_whole(args.output, text)
    else:
        sys.stdout.write(text)
    return 0


def world_size(args: argparse.Namespace) -> int | None:
    """`--world-size`, else `$WORLD_SIZE`, else None: the smallest that the configuration allows.

    Raises:
        InternlmDsError: Not a positive number.
    """
    asked = args.world_size if args.world_size is not None else os.environ.get("WORLD_SIZE")
    if asked is None:
        return None
    if not str(asked).isdecimal() or int(asked) < 1:
        where = "--world-size" if args.world_size is not None else "$WORLD_SIZE"
        raise InternlmDsError(f"{where} = {asked}: a number of ranks is needed, 1 or more")
    return int(asked)


def write_whole(path: str, text: str) -> None:
    """Write a file so that it appears complete or not at all.

    Raises:
        InternlmDsError: It cannot be written.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except OSError as error:
        raise InternlmDsError(f"{path}: cannot be written: {error.strerror}") from None


def _write_report(args: argparse.Namespace, text: str, warnings: Sequence[str]) -> None:
    if args.report_file:
        write_whole(args.report_file, text)
    else:
        sys.stderr.write(text)
    if args.report_file or args.report != "json":  # a JSON report on stderr stays JSON
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)


def _refuse(args: argparse.Namespace, problems: Sequence[Problem], reported: frozenset[str], *, path: str) -> int:
    """Exit code 2; the error is printed unless a JSON report on stderr already says all of it."""
    said = args.report == "json" and not args.report_file and all(problem.key in reported for problem in problems)
    if said:
        return TranslationError.exit_code
    raise TranslationError(problems, path=path)
