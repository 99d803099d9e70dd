"""The command line `internlm-ds`: finds the sub-command, imports only that one, turns errors into lines and exit codes.

A sub-command is a module `internlm_ds.cli.NAME` (dashes become underscores) with `add_arguments(parser)` and
`run(args) -> int`. Its one-line help stands in `COMMANDS`, so that `--help` imports none of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from internlm_ds import __version__
from internlm_ds.errors import guarded

COMMANDS = {
    "convert-config": "translate an InternLM configuration to a DeepSpeed JSON, with a report on every key",
    "show-config": "print every value of a configuration with its origin",
    "plan": "layout, batch arithmetic, parameters and memory of a configuration, without running it",
    "preprocess": "turn text into bin/meta token files",
    "data": "look after token files: find faults in them",
    "convert-checkpoint": "convert a checkpoint between formats",
    "inspect-checkpoint": "what a checkpoint is: format, family, layout, step, sizes, health",
    "generate": "continue a prompt with a trained model",
    "verify": "train a tiny model on every layout that some ranks allow, and compare with one process",
    "report": "one self-contained HTML page with the curves of one or several runs",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="internlm-ds", allow_abbrev=False, description=__doc__.split("\n", 1)[0])
    parser.add_argument("--version", action="version", version=f"internlm-ds {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if argv and argv[0] == name:
            _module(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    return guarded(lambda: _module(args.command).run(args))


def _module(name: str):
    return importlib.import_module(f"internlm_ds.cli.{name.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
