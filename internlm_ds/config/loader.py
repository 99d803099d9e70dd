"""`load`: from a file and its overrides to a checked configuration with the origin of every value.

The steps are other rooms' work: `execute` runs the file, `overrides` puts `--set` in, `validate` reads and checks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internlm_ds.config import overrides as _overrides
from internlm_ds.config import validate
from internlm_ds.config.execute import execute
from internlm_ds.config.keys import SECTIONS, TOP_NAMES
from internlm_ds.config.lines import Path
from internlm_ds.config.reader import GIVEN_WITH_SET, Reader, unknown_message
from internlm_ds.config.schema import Config, Leaf
from internlm_ds.errors import Problem

_EQUAL = (
    (("lr_scheduler", "total_steps"), ("data", "total_steps"), "the schedule is made for another length"),
    (("beta2_scheduler", "init_beta2"), ("adam", "adam_beta2"), "the schedule starts from another value"),
)
"""Pairs that a file usually keeps equal, and what is odd when an override parts them."""


@dataclass(frozen=True)
class Loaded:
    """A configuration as far as it could be read.

    Attributes:
        path: The file as it was named.
        text: Its text.
        config: Typed values. With problems, stand-ins take the place of what is wrong; None when there is too little.
        leaves: Every value with its origin, by section.
        problems: What is wrong; raise them together with those of later checks.
        warnings: What may be meant otherwise.
    """

    path: str
    text: str
    config: Config | None
    leaves: tuple[Leaf, ...]
    problems: list[Problem]
    warnings: list[str]


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Loaded:
    """Execute, override and check a configuration file.

    Raises:
        ConfigError: The file is not there or cannot be executed; everything else is listed in `problems`.
    """
    given = _overrides.parse(overrides, sections=(*SECTIONS, "deepspeed"))
    executed = execute(path, replacements=given.constants)
    values, problems = dict(executed.values), list(given.problems)
    overridden: set[Path] = set()
    for name, value in given.constants.items():
        if name in executed.replaced or name in TOP_NAMES:
            values[name] = value
            overridden.add((name,))
        else:
            message = unknown_message(name, (*executed.values, *TOP_NAMES, *SECTIONS))
            problems.append(Problem(name, message + GIVEN_WITH_SET, value))
    dotted = {path: value for path, value in given.dotted.items() if _is_known_top(path[0], executed.values)}
    for key in [key for key in given.dotted if key not in dotted]:
        message = unknown_message(key[0], (*SECTIONS, "deepspeed"))
        problems.append(Problem(".".join(key), message + GIVEN_WITH_SET, given.dotted[key]))
    changed, refused = _overrides.apply(values, dotted)
    overridden.update(dotted)
    reader = Reader(changed, executed.places, frozenset(overridden))
    reader.problems.extend([*problems, *refused])
    reader.warnings.extend(_parted(values, changed, reader))
    config = validate.validate(reader)
    leaves = tuple(sorted(reader.leaves.values(), key=_rank))
    return Loaded(executed.path, executed.text, config, leaves, reader.problems, reader.warnings)


_ORDER = {name: rank for rank, name in enumerate((*TOP_NAMES, *SECTIONS))}


def _rank(leaf: Leaf) -> int:
    """Helper constants first, then top-level values, then section by section."""
    return -1 if leaf.helper else _ORDER.get(leaf.key.partition(".")[0], len(_ORDER))


def _is_known_top(name: str, values: dict[str, Any]) -> bool:
    return name in SECTIONS or name == "deepspeed" or isinstance(values.get(name), dict)


def _parted(before: dict[str, Any], after: dict[str, Any], reader: Reader) -> list[str]:
    """Warnings for pairs that were equal in the file and no longer are."""
    warnings = []
    for follower, leader, oddity in _EQUAL:
        was, is_now = (_at(before, follower), _at(before, leader)), (_at(after, follower), _at(after, leader))
        if None in was or was[0] != was[1] or None in is_now or is_now[0] == is_now[1]:
            continue
        name, place = ".".join(follower), reader.place(follower)
        line = f" (line {place.line})" if place and not reader.is_overridden(follower) else ""
        warnings.append(
            f"{name} = {is_now[0]!r}{line} no longer equals {'.'.join(leader)} = {is_now[1]!r}: {oddity}; "
            f"to keep them equal add --set {name}={is_now[1]!r}"
        )
    return warnings


def _at(values: dict[str, Any], path: Path) -> Any:
    section = values.get(path[0])
    return section.get(path[1]) if isinstance(section, dict) else None
