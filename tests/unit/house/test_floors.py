"""The house stands: nothing leans on a floor above it or on a room to its right, no cycles, torch starts on floor 2.

The table below is the one of `docs/architecture.md`. A new room gets its place here before it gets its first import.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "internlm_ds"
DOORS = ("launch", "preprocessing")

# floor by floor, left to right: a room may import lower floors, and on its own floor the rooms to its left
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "registry", "config", "arch", "layout", "runspec"),
    ("monitor", "optim", "schedule", "data", "preprocess", "translate", "plan", "parallel.environment"),
    ("parallel", "attention", "model", "optim.param_groups", "data.loader", "checkpoint", "convert", "testing"),
    ("engine", "train", "generate", "verify"),
    ("cli", *DOORS),
)
PLACES = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms)}
PAPER_FLOORS = 2
HEAVY = ("torch", "deepspeed")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package and every script of the doors, by dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for door in DOORS:
        found.update({f"{door}.{path.stem}": path for path in sorted((ROOT / door).glob("*.py"))})
    return found


def room_of(module: str) -> str:
    """The narrowest room of the table that holds a module."""
    name = module.removeprefix(PACKAGE + ".")
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (room := ".".join(parts[:length])) in PLACES:
            return room
    raise AssertionError(f"{module} is in no room of the table: give it a place in FLOORS and in docs/architecture.md")


@cache
def syntax_tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"), filename=str(modules()[module]))


def imports_in(node: ast.AST, *, module: str, anywhere: bool) -> Iterator[tuple[str, int]]:
    """Dotted names that are imported below `node` with their lines: at import time only, or inside functions too.

    What stands under `if TYPE_CHECKING:` is never executed and is left out.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from imported_from(child, module=module)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imports_in(other, module=module, anywhere=anywhere)
        elif anywhere or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_in(child, module=module, anywhere=anywhere)


def imported_from(node: ast.ImportFrom, *, module: str) -> Iterator[tuple[str, int]]:
    """`from a.b import c` is `a.b.c` where that is a module of ours, else `a.b`."""
    base = node.module or ""
    if node.level:
        is_package = modules()[module].name == "__init__.py"
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        base = ".".join([*parents, *([node.module] if node.module else [])])
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        yield whole if whole in modules() else base, node.lineno


def edges() -> Iterator[tuple[str, str, int]]:
    """`(module, imported module of ours, line)`, imports inside functions included."""
    for module in modules():
        for target, line in imports_in(syntax_tree(module), module=module, anywhere=True):
            if target.split(".")[0] == PACKAGE and target != PACKAGE:
                yield module, target, line


def shown(module: str, line: int) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{line}"


def test_no_import_goes_up_or_to_the_right():
    wrong = []
    for module, target, line in edges():
        here, there = room_of(module), room_of(target)
        if here != there and PLACES[there] > PLACES[here]:
            wrong.append(f"{shown(module, line)}: {here} {PLACES[here]} imports {there} {PLACES[there]}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle():
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for module, target, _ in edges():
        if target != module:
            graph[module].add(target)
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            trail.append(module)
            for target in sorted(graph.get(module, ())):
                visit(target)
            done.add(trail.pop())

    for module in graph:
        visit(module)


def test_only_the_engine_imports_deepspeed():
    wrong = [
        shown(module, line)
        for module in modules()
        if room_of_or_root(module) != "engine"
        for target, line in imports_in(syntax_tree(module), module=module, anywhere=True)
        if target.split(".")[0] == "deepspeed"
    ]
    assert not wrong, "deepspeed is imported outside internlm_ds/engine: " + ", ".join(wrong)


def paper_modules() -> list[str]:
    """Modules of floors 0 and 1."""
    return [m for m in modules() if room_of_or_root(m) == PACKAGE or PLACES[room_of(m)][0] < PAPER_FLOORS]


def room_of_or_root(module: str) -> str:
    return PACKAGE if module == PACKAGE else room_of(module)


def test_paper_floors_import_no_torch_at_module_level():
    wrong = [
        f"{shown(module, line)}: {target}"
        for module in paper_modules()
        for target, line in imports_in(syntax_tree(module), module=module, anywhere=False)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_the_paper_floors_loads_no_torch():
    script = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    command = [sys.executable, "-c", script, json.dumps(paper_modules())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(json.loads(done.stdout))


@pytest.mark.parametrize("door", DOORS)
def test_scripts_shadow_no_module_of_others(door: str):
    """A script's folder comes first on sys.path: a file there must not be named like a module somebody imports."""
    taken = {*sys.stdlib_module_names, "torch", "deepspeed", "numpy", "datasets", "tokenizers", "tokenize"}
    assert not taken & {path.stem for path in (ROOT / door).glob("*.py")}


def test_files_open_with_what_they_own():
    silent = [shown(m, 1) for m in modules() if modules()[m].stat().st_size and not ast.get_docstring(syntax_tree(m))]
    assert not silent, "no docstring at the top: " + ", ".join(silent)


def test_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {room_of(module) for module in modules() if module != PACKAGE}
    assert not [room for room in sorted(rooms - set(DOORS)) if f"| `{room.split('.')[0]}` |" not in page]
