"""Tasks below a command (`internlm-ds preprocess text`): a table of names and helps, a module loaded when it is called.

A module of a task has `add_arguments(parser, task)` and `run(args) -> int`; one module may serve several tasks. So
`internlm-ds preprocess --help` imports none of them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple


class Task(NamedTuple):
    """The module below `internlm_ds.cli` that does the task, and its line in the help."""

    module: str
    help: str


def add_tasks(parser: argparse.ArgumentParser, tasks: Mapping[str, Task]) -> None:
    """Sub-commands of `parser`; the name of the one that is called is `args.task`."""
    commands = parser.add_subparsers(dest="task", metavar="TASK", required=True, parser_class=_TaskParser)
    for name, (module, help_text) in tasks.items():
        commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False).filled_by(module, name)


def run_task(args: argparse.Namespace, tasks: Mapping[str, Task]) -> int:
    """Do `args.task`; returns the exit code."""
    code: int = _module(tasks[args.task].module).run(args)
    return code


class _TaskParser(argparse.ArgumentParser):
    """A parser that gets its options when it is used."""

    _origin: tuple[str, str] | None = None

    def filled_by(self, module: str, task: str) -> None:
        self._origin = module, task

    def parse_known_args(self, *args: Any, **keywords: Any) -> Any:
        if self._origin is not None:
            (module, task), self._origin = self._origin, None
            _module(module).add_arguments(self, task)
        return super().parse_known_args(*args, **keywords)


def _module(name: str) -> Any:
    return importlib.import_module(f"internlm_ds.cli.{name}")
