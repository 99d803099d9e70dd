"""Everything a user or a file can get wrong, as one tree.

::

    InternlmDsError                exit code 2 unless a subclass says otherwise
    ├── ConfigError                the configuration file, or an override of it
    ├── LayoutError                sizes that do not divide, ranks that do not exist
    ├── TranslationError           what DeepSpeed or this version cannot honour
    ├── MachineError               this machine cannot run what was asked (no GPU, too little memory, …)
    ├── DataFormatError            bin/meta files, text inputs
    ├── TokenizerError             sentencepiece models and the pieces they lack
    ├── CheckpointError            a checkpoint that is missing or does not fit
    │   └── CheckpointDamagedError exit code 4: damaged, and no good one left
    ├── ConversionError            a checkpoint that cannot take the format asked for
    ├── MissingExtraError          an optional package that is not installed
    ├── TrainingStoppedError       exit code 3: the training guard stopped the run
    └── ReplicasDifferError        exit code 3: copies of a parameter differ between ranks

A message says what was asked, what was found, where it was written and what would work.
`assert` is for our own bugs; these classes are for everything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: Dotted name as the user wrote it (`data.micro_nun`, `JOB_NAME`).
        message: What is wrong and what would work, without the key and the value.
        value: The offending value; `Problem.NO_VALUE` when there is none (a missing key).
        line: Line in `path` (1-based), None for a default, an override or a derived value.
        path: File that holds the line, None when it is the main configuration file.
    """

    key: str
    message: str
    value: Any = None
    line: int | None = None
    path: str | None = None
    has_value: bool = True

    def __str__(self) -> str:
        where = f" ({self.path + ': ' if self.path else ''}line {self.line})" if self.line else ""
        shown = f" = {self.value!r}" if self.has_value else ""
        return f"{self.key}{shown}{where}: {self.message}"


class InternlmDsError(Exception):
    """Base of all errors that a user sees as one to a few lines, without a traceback.

    `on_all_ranks` is set on an error that every rank of a job raises with the same words: one of them says it.
    """

    exit_code = 2
    on_all_ranks = False


class _ProblemsError(InternlmDsError):
    """An error that lists several problems of one file, with one line of advice on all of them behind."""

    def __init__(self, problems: Sequence[Problem] | str, *, path: str | None = None, advice: str | None = None):
        self.path = path
        self.advice = advice
        self.problems: tuple[Problem, ...] = () if isinstance(problems, str) else tuple(problems)
        if isinstance(problems, str):
            super().__init__(problems)
            return
        count = len(self.problems)
        where = f" in {path}" if path else ""
        lines = [f"{count} problem{'s' if count != 1 else ''}{where}", *(f"  {p}" for p in self.problems)]
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


class ConfigError(_ProblemsError):
    """A configuration file, or an override of it, cannot be used."""


class LayoutError(_ProblemsError):
    """Ranks, stages or batch sizes do not divide as asked."""


class TranslationError(_ProblemsError):
    """A key asks for what DeepSpeed or this version cannot do."""


class MachineError(_ProblemsError):
    """This machine cannot run the configuration."""


class DataFormatError(InternlmDsError):
    """A data file is not what it should be.

    Args:
        message: What was found and what would work.
        path: The file.
        line: 1-based line in it.
        offset_bytes: Byte offset in it.
    """

    def __init__(
        self, message: str, *, path: str | None = None, line: int | None = None, offset_bytes: int | None = None
    ):
        self.path, self.line, self.offset_bytes = path, line, offset_bytes
        where = "".join(
            part
            for part in (
                f"{path}" if path else "",
                f", line {line}" if line is not None else "",
                f", byte {offset_bytes}" if offset_bytes is not None else "",
            )
        )
        super().__init__(f"{where}: {message}" if where else message)


class TokenizerError(InternlmDsError):
    """A tokenizer model is missing, unreadable or lacks a piece."""


class CheckpointError(InternlmDsError):
    """A checkpoint is missing or does not fit what is to be loaded into."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is damaged and no good one is left."""

    exit_code = 4


class ConversionError(InternlmDsError):
    """A checkpoint cannot take the format asked for."""


class MissingExtraError(InternlmDsError):
    """An optional package is not installed."""

    def __init__(self, package: str, *, extra: str, needed_for: str):
        self.package, self.extra = package, extra
        super().__init__(f"{needed_for} needs the package {package}: pip install 'internlm-ds[{extra}]'")


class TrainingStoppedError(InternlmDsError):
    """The training guard stopped the run: too many bad steps."""

    exit_code = 3
    on_all_ranks = True


class ReplicasDifferError(InternlmDsError):
    """The training guard stopped the run: copies of a parameter differ between ranks."""

    exit_code = 3
    on_all_ranks = True


def guarded(action: Callable[[], int]) -> int:
    """Run `action`; print an `InternlmDsError` as plain lines on stderr and return its exit code, 130 for a Ctrl-C.

    With `INTERNLM_DS_DEBUG=1` the traceback is shown instead.
    """
    try:
        return action()
    except InternlmDsError as error:
        if os.environ.get("INTERNLM_DS_DEBUG") == "1":
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away (`| head`): nothing is wrong, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
