"""`--set KEY=VALUE`: reading it, and putting it into the values of a file.

A bare name replaces a top-level value while the file executes (that part is `execute`'s); a dotted path applies
afterwards.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from internlm_ds.config.lines import Path
from internlm_ds.errors import Problem

_SPECIAL = {
    "inf": float("inf"),
    "-inf": float("-inf"),
    "nan": float("nan"),
}
_INTEGER_FORMS = {("parallel", name) for name in ("zero1", "tensor", "pipeline", "weight")}
"""Dicts that may be written as their `size` alone."""


@dataclass(frozen=True)
class Overrides:
    """Overrides by kind; the last one of a key wins.

    Attributes:
        constants: Bare top-level names.
        dotted: Values by path, in the order given.
        problems: Arguments that cannot be read.
    """

    constants: dict[str, Any] = field(default_factory=dict)
    dotted: dict[Path, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse(arguments: Sequence[str], *, sections: Sequence[str] = ()) -> Overrides:
    """Read the arguments of `--set`.

    Args:
        sections: Bare names that are dicts of the configuration: they are replaced afterwards, like dotted paths.

    >>> parse(["SEQ_LEN=4096", "parallel.tensor={'size': 2}"]).dotted
    {('parallel', 'tensor'): {'size': 2}}
    """
    found = Overrides()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(part.isidentifier() for part in path[:1]) or not all(path):
            message = "write KEY=VALUE, e.g. --set data.micro_num=2 or --set SEQ_LEN=4096"
            found.problems.append(Problem(f"--set {argument}", message, has_value=False))
        elif len(path) == 1 and key.strip() not in sections:
            found.constants[path[0]] = read_value(text)
        else:
            found.dotted.pop(path, None)
            found.dotted[path] = read_value(text)
    return found


def read_value(text: str) -> Any:
    """A Python literal, an infinity, else the string itself.

    >>> read_value("{'size': 2, 'mode': 'msp'}")
    {'size': 2, 'mode': 'msp'}
    >>> read_value("local:ckpts")
    'local:ckpts'
    """
    text = text.strip()
    bare = text.replace("float(", "").rstrip(")").strip("'\"") if text.startswith("float(") else text
    if bare in _SPECIAL:
        return _SPECIAL[bare]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def apply(values: Mapping[str, Any], dotted: Mapping[Path, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Values with the dotted overrides put in; a leaf may become a dict, missing dicts are made.

    An integer in the way of `parallel.tensor.mode` and its like is first read as its `size`.

    Returns:
        New values (the old ones are not changed), and overrides that lead through something that is no dict.
    """
    changed = copy.deepcopy(dict(values))
    problems: list[Problem] = []
    for path, value in dotted.items():
        at = changed
        for depth, part in enumerate(path[:-1], start=1):
            below = at.get(part)
            if isinstance(below, int) and not isinstance(below, bool) and path[:depth] in _INTEGER_FORMS:
                below = at[part] = {"size": below}
            elif below is None:
                below = at[part] = {}
            if not isinstance(below, dict):
                name = ".".join(path[:depth])
                message = f"{name} = {below!r} is no dict, so nothing below it can be set"
                problems.append(Problem(".".join(path), message, value))
                break
            at = below
        else:
            at[path[-1]] = copy.deepcopy(value)
    return changed, problems
