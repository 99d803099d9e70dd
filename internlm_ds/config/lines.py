"""Where each value of a configuration was written: lines of the leaves of nested dicts, read off the syntax tree.

`a = dict(b=1)`, `{"b": 1}`, `a["b"] = 1`, `a.update(b=1)`, `a |= …`, copies (`**BASE`, `dict(BASE, b=1)`) and names
imported from base files are followed. A value computed in any other way gets the line of its own key. Executing the
file is `execute`'s, which also records which branches of an `if` ran.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import NamedTuple

Path = tuple[str, ...]
RAN = "__config_ran__"
"""Name of the function that records, while a file executes, that a branch of it runs."""


class Place(NamedTuple):
    """A line (1-based) of a file; `file` is None in the main configuration."""

    line: int
    file: str | None = None


Places = dict[Path, Place]


def mark_branches(tree: ast.Module) -> None:
    """Let each branch that need not run (`if`, `except`, `case`, …) of the module's own code record that it did."""
    _mark_all(tree.body)


def _mark_all(statements: list[ast.stmt]) -> None:
    for statement in statements:
        for body, optional in _bodies(statement):
            _mark_all(body)
            if optional and body:
                call = ast.Call(ast.Name(RAN, ast.Load()), [ast.Constant(id(body))], [])
                marker = ast.copy_location(ast.Expr(call), body[0])
                body.insert(0, ast.fix_missing_locations(marker))


def _bodies(statement: ast.stmt) -> Iterator[tuple[list[ast.stmt], bool]]:
    """Blocks inside a statement that run in the module's own namespace, and whether they need not run."""
    if isinstance(statement, ast.With):
        yield statement.body, False
    elif isinstance(statement, ast.If | ast.For | ast.While):
        yield statement.body, True
        yield statement.orelse, True
    elif isinstance(statement, ast.Try):
        yield statement.body, False
        for handler in statement.handlers:
            yield handler.body, True
        yield statement.orelse, True
        yield statement.finalbody, False
    elif isinstance(statement, ast.Match):
        for case in statement.cases:
            yield case.body, True


def collect(
    tree: ast.Module, *, file: str | None, modules: Mapping[str, Places], package: str, ran: set[int]
) -> Places:
    """Places of all names that a module's own code assigns, nested keys of dicts included.

    Args:
        tree: The module after `mark_branches`.
        file: Path recorded in its places; None for the main file.
        modules: Places of the modules it may import, by full name.
        package: Full name of its package, for relative imports.
        ran: What `RAN` was called with.
    """
    collector = _Collector(file=file, modules=modules, package=package, ran=ran)
    collector.statements(tree.body)
    return collector.places


class _Collector:
    def __init__(self, *, file: str | None, modules: Mapping[str, Places], package: str, ran: set[int]):
        self.places: Places = {}
        self._file, self._modules, self._package, self._ran = file, modules, package, ran

    def statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)
            for inner, optional in _bodies(statement):
                if not optional or id(inner) in self._ran:
                    self.statements(inner)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.AugAssign):
            path = _path(node.target)
            if path and isinstance(node.op, ast.BitOr):
                self._children(path, node.value)
            elif path:
                self._write(path, node.lineno)
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                self._forget(_path(target) or ())
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self._update(node.value)
        elif isinstance(node, ast.ImportFrom):
            self._import_from(node)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                path = (alias.asname,) if alias.asname else tuple(alias.name.split("."))
                self._copy(self._modules.get(alias.name, {}), (), path)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
            for one_target, one_value in zip(target.elts, values):
                self._assign(one_target, one_value)
            return
        path = _path(target)
        if path:
            # the source of a copy may be what is being replaced: `model = dict(model, x=1)`
            source = dict(self.places)
            self._write(path, target.lineno)
            self._children(path, value, source=source)

    def _write(self, path: Path, line: int) -> None:
        self._forget(path)
        self.places[path] = Place(line, self._file)

    def _forget(self, path: Path) -> None:
        if path:
            for key in [key for key in self.places if key[: len(path)] == path]:
                del self.places[key]

    def _children(self, path: Path, value: ast.expr, *, source: Places | None = None) -> None:
        """Record the places of the keys that an expression gives to the dict at `path`."""
        if isinstance(value, ast.Dict):
            for key, item in zip(value.keys, value.values):
                if key is None:
                    self._children(path, item, source=source)
                elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._child((*path, key.value), key.lineno, item, source)
        elif isinstance(value, ast.Call) and _is_copying(value):
            for argument in value.args:
                self._children(path, argument, source=source)
            if isinstance(value.func, ast.Attribute) and value.func.attr == "copy":
                self._children(path, value.func.value, source=source)
            for keyword in value.keywords:
                if keyword.arg is None:
                    self._children(path, keyword.value, source=source)
                else:
                    self._child((*path, keyword.arg), keyword.lineno, keyword.value, source)
        elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
            self._children(path, value.left, source=source)
            self._children(path, value.right, source=source)
        else:
            origin = _path(value)
            if origin:
                self._copy(self.places if source is None else source, origin, path)

    def _child(self, path: Path, line: int, value: ast.expr, source: Places | None) -> None:
        self._write(path, line)
        self._children(path, value, source=source)

    def _update(self, call: ast.Call) -> None:
        """`model.update(...)`"""
        if isinstance(call.func, ast.Attribute) and call.func.attr == "update":
            path = _path(call.func.value)
            if path:
                as_dict = ast.Call(ast.Name("dict", ast.Load()), call.args, call.keywords)
                self._children(path, as_dict)

    def _import_from(self, node: ast.ImportFrom) -> None:
        name = node.module or ""
        if node.level:
            parents = self._package.split(".")
            name = ".".join([*parents[: len(parents) - node.level + 1], *([name] if name else [])])
        for alias in node.names:
            if alias.name == "*":
                for path, place in self._modules.get(name, {}).items():
                    if not path[0].startswith("_"):
                        self.places[path] = place
                continue
            target = (alias.asname or alias.name,)
            self._copy(self._modules.get(name, {}), (alias.name,), target)
            self._copy(self._modules.get(f"{name}.{alias.name}", {}), (), target)

    def _copy(self, source: Places, origin: Path, target: Path) -> None:
        """Places below `origin` become places below `target`; the target's own line stays, if it has one."""
        for path, place in list(source.items()):
            if path[: len(origin)] == origin:
                new = (*target, *path[len(origin) :])
                if len(path) > len(origin) or new not in self.places:
                    self.places[new] = place


def _is_copying(call: ast.Call) -> bool:
    """`dict(…)`, `copy(x)`, `deepcopy(x)`, `copy.deepcopy(x)`, `x.copy()`."""
    if isinstance(call.func, ast.Name):
        return call.func.id in ("dict", "copy", "deepcopy")
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("copy", "deepcopy")


def _path(node: ast.expr) -> Path | None:
    """`a`, `a["b"]["c"]` and `a.b` as a path; None for any other expression."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        above = _path(node.value)
        return (*above, node.slice.value) if above else None
    if isinstance(node, ast.Attribute):
        above = _path(node.value)
        return (*above, node.attr) if above else None
    return None
