"""Lines of values: every way to write a dict, copies, base files, branches."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_ds.config.execute import execute
from internlm_ds.config.lines import Place, collect


def places(text: str) -> dict[str, int]:
    found = collect(ast.parse(text), file=None, modules={}, package="", ran=set())
    return {".".join(path): place.line for path, place in found.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = dict(\n  b=1,\n  c=dict(\n    d=2))", {"a": 1, "a.b": 2, "a.c": 3, "a.c.d": 4}),
        ('a = {\n  "b": 1,\n  "c": {\n    "d": 2}}', {"a": 1, "a.b": 2, "a.c": 3, "a.c.d": 4}),
        ('a = dict(b=1)\na["b"] = 2\na["c"] = 3', {"a": 1, "a.b": 2, "a.c": 3}),
        ("a = dict(b=1)\na.update(b=2,\n  c=3)", {"a": 1, "a.b": 2, "a.c": 3}),
        ('a = dict(b=1)\na |= {\n  "c": 3}', {"a": 1, "a.b": 1, "a.c": 3}),
        ("B = dict(x=1)\na = dict(**B,\n  y=2)", {"B": 1, "B.x": 1, "a": 2, "a.x": 1, "a.y": 3}),
        ("a = dict(x=1, y=1)\na = dict(a,\n  y=2)", {"a": 2, "a.x": 1, "a.y": 3}),
        ("B = dict(x=1)\na = B", {"B": 1, "B.x": 1, "a": 2, "a.x": 1}),
        ("B = dict(x=1)\na = B.copy()", {"B": 1, "B.x": 1, "a": 2, "a.x": 1}),
        ("B = dict(x=1)\na = B | dict(\n  y=2)", {"B": 1, "B.x": 1, "a": 2, "a.x": 1, "a.y": 3}),
        ("a = f(\n  1)", {"a": 1}),
        ("a, b = 1, dict(\n  c=2)", {"a": 1, "b": 1, "b.c": 2}),
        ("a: int = 3", {"a": 1}),
        ("a = dict(b=1)\ndel a", {}),
        ("a = dict(b=1)\na = dict(\n  c=1)", {"a": 2, "a.c": 3}),
        ("with x:\n  a = 1", {"a": 2}),
        ("def f():\n  a = 1", {}),
    ],
)
def test_lines_of_dicts(text: str, expected: dict[str, int]) -> None:
    assert places(text) == expected


@pytest.mark.parametrize("flag", [True, False])
def test_only_the_branch_that_ran_counts(tmp_path: Path, flag: bool) -> None:
    path = tmp_path / "c.py"
    path.write_text(f"if {flag}:\n  a = dict(\n    b=1)\nelse:\n  a = dict(\n    b=2)\n")
    executed = execute(path)
    assert executed.values == {"a": {"b": 1 if flag else 2}}
    assert executed.places[("a", "b")].line == (3 if flag else 6)


def test_a_failed_try_counts_by_its_handler(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("try:\n  import no_such_module_at_all\n  a = 1\nexcept ImportError:\n  a = 2\n")
    assert execute(path).places[("a",)].line == 5


def test_lines_of_base_files(tmp_path: Path) -> None:
    base = tmp_path / "configs" / "_base_" / "models.py"
    base.parent.mkdir(parents=True)
    base.write_text("model = dict(\n  a=1,\n  b=1)\nOTHER = 3\n")
    path = tmp_path / "configs" / "c.py"
    path.write_text(
        "from internlm.utils.utils import read_base\n"
        "with read_base():\n"
        "  from configs._base_.models import *\n"
        "model.update(\n  b=2)\n"
    )
    executed = execute(path)
    assert executed.values == {"model": {"a": 1, "b": 2}, "OTHER": 3}
    assert executed.places[("model", "a")] == Place(2, str(base))
    assert executed.places[("model", "b")] == Place(5, None)


@pytest.mark.parametrize(
    "statement",
    ["import configs.base as base\nmodel = base.model", "from configs import base\nmodel = base.model",
     "from configs.base import model as m\nmodel = dict(**m)"],
)  # fmt: skip
def test_lines_through_modules(tmp_path: Path, statement: str) -> None:
    base = tmp_path / "configs" / "base.py"
    base.parent.mkdir()
    base.write_text("\nmodel = dict(\n  a=1)\n")
    path = tmp_path / "c.py"
    path.write_text(statement + "\n")
    executed = execute(path)
    assert executed.values["model"] == {"a": 1}
    assert executed.places[("model", "a")] == Place(3, str(base))


NAMES = st.text("abcdefgh", min_size=1, max_size=4).filter(lambda name: not keyword.iskeyword(name))
TREES = st.recursive(st.integers(), lambda below: st.dictionaries(NAMES, below, max_size=3), max_leaves=12)


@settings(deadline=None, max_examples=60)
@given(tree=st.dictionaries(NAMES, TREES, min_size=1, max_size=4), as_call=st.booleans())
def test_each_leaf_has_the_line_it_was_written_on(tree: dict[str, object], as_call: bool) -> None:
    lines: list[str] = []
    expected: dict[tuple[str, ...], int] = {}

    def emit(path: tuple[str, ...], value: object, before: str) -> None:
        lines.append(before)
        expected[path] = len(lines)
        if isinstance(value, dict):
            lines[-1] += "dict(" if as_call else "{"
            for key, item in value.items():
                emit((*path, key), item, f"{key}=" if as_call else f"{key!r}: ")
                lines[-1] += ","
            lines.append(")" if as_call else "}")
        else:
            lines[-1] += repr(value)

    for name, value in tree.items():
        emit((name,), value, f"{name} = ")
    found = collect(ast.parse("\n".join(lines)), file=None, modules={}, package="", ran=set())
    assert {path: place.line for path, place in found.items()} == expected
