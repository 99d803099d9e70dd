"""Reads values section by section: applies rules and defaults, finds misspelt keys, keeps every leaf with its origin.

It knows nothing of what keys mean together; that is `validate`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from internlm_ds.config.execute import Opaque
from internlm_ds.config.keys import REQUIRED, STAND_INS, Section, all_keys
from internlm_ds.config.lines import Path, Place, Places
from internlm_ds.config.names import nearest
from internlm_ds.config.rules import Refused, Rule, anything
from internlm_ds.config.schema import Leaf, Origin
from internlm_ds.errors import Problem

MISSING: Any = object()
GIVEN_WITH_SET = " (given with --set)"


class Reader:
    """Collects the leaves, problems and warnings of one configuration.

    Args:
        values: Plain data by top-level name, overrides applied.
        places: Lines of names and nested keys.
        overridden: Paths whose value, with everything below it, comes from `--set`.
    """

    def __init__(self, values: Mapping[str, Any], places: Places, overridden: frozenset[Path]):
        self.values, self._places, self._overridden = values, places, overridden
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.leaves: dict[str, Leaf] = {}

    # where a value comes from

    def place(self, path: Path) -> Place | None:
        """Line of the closest written key at or above a path."""
        while path:
            if path in self._places:
                return self._places[path]
            path = path[:-1]
        return None

    def is_overridden(self, path: Path) -> bool:
        return any(path[:length] in self._overridden for length in range(1, len(path) + 1))

    def problem(self, path: Path, message: str, value: Any = MISSING) -> None:
        """Note a problem of a key, with the line that wrote it."""
        overridden = self.is_overridden(path)
        place = None if overridden else self.place(path)
        self.problems.append(
            Problem(
                ".".join(path),
                message + (GIVEN_WITH_SET if overridden else ""),
                None if value is MISSING else value,
                line=place.line if place else None,
                path=place.file if place else None,
                has_value=value is not MISSING,
            )
        )

    # leaves

    def leaf(self, path: Path, value: Any, *, note: str = "", written: Path = (), helper: bool = False) -> None:
        """Keep a value that the file or an override gave."""
        origin: Origin = "override" if self.is_overridden(written or path) else "file"
        place = self.place(written or path) if origin == "file" else None
        key = ".".join(path)
        self.leaves[key] = Leaf(
            key,
            value,
            origin,
            line=place.line if place else None,
            file=place.file if place else None,
            note=note,
            helper=helper,
            written=".".join(written),
        )

    def default(self, path: Path, value: Any) -> None:
        self.leaves[".".join(path)] = Leaf(".".join(path), value, "default")

    def derive(self, key: str, value: Any, note: str) -> None:
        """A value that follows from others. It replaces a default; what the file gave stays, and gets the note."""
        before = self.leaves.get(key)
        if before is None or before.origin in ("default", "derived"):
            self.leaves[key] = Leaf(key, value, "derived", note=note)
        else:
            self.leaves[key] = replace(before, note=note)

    def note(self, key: str, note: str) -> None:
        self.leaves[key] = replace(self.leaves[key], note=note)

    def given(self, key: str) -> bool:
        """Whether the file or an override wrote this key."""
        return key in self.leaves and self.leaves[key].origin in ("file", "override")

    # sections

    def section(
        self,
        path: Path,
        section: Section,
        tree: Any,
        *,
        only: Iterable[str] | None = None,
        accept_more: bool = False,
        written: Path = (),
    ) -> dict[str, Any]:
        """Typed values of a dict, defaults included.

        Args:
            path: Its dotted name as a tuple.
            tree: The dict; `MISSING` when there is none.
            only: Keys that are known here, of those the section has.
            accept_more: Leave unknown keys alone.
            written: Path that the file uses for `path` (a misspelt name, an integer form).
        """
        written = written or path
        if tree is not MISSING and not isinstance(tree, dict):
            self.problem(written, f"must be a dict, e.g. {written[-1]} = dict(...)", tree)
            tree = MISSING
        tree = {} if tree is MISSING else tree
        known = tuple(only) if only is not None else section.known
        adopted = {} if accept_more else self._unknown_keys(path, known, tree, written)
        values: dict[str, Any] = {}
        for key, rule in section.rules.items():
            if key in known:
                source = adopted.get(key, key)
                values[key] = self.value(
                    (*path, key), rule, section.default(key), tree.get(source, MISSING),
                    written=(*written, source), misspelt=key in adopted,
                )  # fmt: skip
        for key, inner in section.nested.items():
            source = adopted.get(key, key)
            below = tree.get(source, MISSING)
            if key in section.optional and (below is None or below is MISSING):
                values[key] = self.value((*path, key), anything(), None, below, written=(*written, source))
            else:
                values[key] = self.nested((*path, key), inner, below, written=(*written, source))
        for key, legacy in section.legacy.items():
            if key in tree:
                values[key] = self.value((*path, key), legacy.rule, None, tree[key], written=(*written, key))
                self._note_below(".".join((*path, key)), legacy.note)
        return values

    def nested(self, path: Path, section: Section, tree: Any, *, written: Path) -> Any:
        """A section as its dataclass."""
        values = self.section(path, section, tree, written=written)
        return section.schema(**{key: value for key, value in values.items() if key not in section.legacy})

    def _note_below(self, key: str, note: str) -> None:
        for name in [name for name in self.leaves if name == key or name.startswith(key + ".")]:
            self.note(name, note)

    def value(
        self, path: Path, rule: Rule, default: Any, raw: Any, *, written: Path = (), misspelt: bool = False
    ) -> Any:
        """Typed value of one key. A wrong or missing one gives a problem and its stand-in."""
        key, written = ".".join(path), written or path
        stand_in = STAND_INS.get(key) if default is REQUIRED else default
        if raw is MISSING:
            if default is REQUIRED:
                self.missing(path, rule)
                return stand_in
            self.default(path, _shown(key, default))
            return default
        same = () if written == path else written
        if isinstance(raw, dict) and rule.expected == "anything":
            self.flatten(path, raw)
            return raw
        self.leaf(path, raw, written=same)
        try:
            opaque = _first_opaque(raw)
            if opaque is not None:
                raise Refused(f"is a {opaque.type_name}; a configuration holds numbers, strings, lists and dicts only")
            return rule.read(raw)
        except Refused as refused:
            # a misspelt key is one problem; what it holds is looked at once its name is right
            if not misspelt:
                self.problem(written, str(refused), raw)
            return stand_in

    def missing(self, path: Path, rule: Rule) -> None:
        """A required key that is not there; silent when its whole section is missing or wrong, which is said once."""
        above = {".".join(path[:length]) for length in range(1, len(path))}
        if any(problem.key in above for problem in self.problems):
            return
        self.problem(path, f"is required: {rule.expected}")

    def flatten(self, path: Path, tree: Any, *, note: str = "") -> None:
        """Leaves of a dict with free keys; an empty dict is a leaf itself."""
        if isinstance(tree, dict) and tree:
            for key, value in tree.items():
                self.flatten((*path, key), value, note=note)
            return
        opaque = _first_opaque(tree)
        if opaque is not None:
            self.problem(
                path, f"is a {opaque.type_name}; a configuration holds numbers, strings, lists and dicts only", tree
            )
            return
        self.leaf(path, tree, note=note)

    def _unknown_keys(
        self, path: Path, known: tuple[str, ...], tree: Mapping[str, Any], written: Path
    ) -> dict[str, str]:
        """Report keys that nobody knows. Returns, for absent known keys, the misspelt one that stands for each."""
        adopted: dict[str, str] = {}
        for key in [key for key in tree if key not in known]:
            absent = [name for name in known if name not in tree and name not in adopted]
            found = nearest(key, absent)
            if found:
                adopted[found] = key
            self.unknown((*written, key), known, value=tree[key], section=path)
        return adopted

    def unknown(self, path: Path, known: Iterable[str], *, value: Any = MISSING, section: Path = ()) -> None:
        """A key that nobody knows, with the nearest one that is known."""
        shown = MISSING if isinstance(value, dict) else value
        self.problem(path, unknown_message(path[-1], known, section=section), shown)


def unknown_message(key: str, known: Iterable[str], *, section: Path = ()) -> str:
    """Why a key is refused, and which one was probably meant."""
    known = tuple(known)
    close = nearest(key, known)
    if close:
        return f"unknown key; did you mean {close}?"
    elsewhere = [name for name in all_keys() if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key here; it belongs to {elsewhere[0].rpartition('.')[0] or 'the top level'}: {elsewhere[0]}"
    far = nearest(key, known, cutoff=0.0)
    place = f" of {'.'.join(section)}" if section else ""
    return f"unknown key; the nearest known key{place} is {far}" if far else "unknown key"


def _first_opaque(value: Any) -> Opaque | None:
    if isinstance(value, Opaque):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for found in map(_first_opaque, value) if found), None)
    return None


def _shown(key: str, default: Any) -> Any:
    """A default as a user would write it."""
    return f"torch.{default}" if key == "model.dtype" else default
