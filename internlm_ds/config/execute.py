"""Executes a configuration file once and keeps its plain data, with the line of each value.

While a file executes, `internlm.utils.utils.read_base` exists, `configs.…` and modules beside the file can be imported,
and constants named by `--set` are replaced as they are assigned. All of that is gone afterwards. What the values mean
is `validate`'s.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any

from internlm_ds.config.lines import RAN, Places, collect, mark_branches
from internlm_ds.errors import ConfigError, Problem

_STUBS = ("internlm", "internlm.utils", "internlm.utils.utils")
_OWN_ROOTS = ("internlm", "configs")


@dataclass(frozen=True)
class Opaque:
    """Stands for a value that is not plain data."""

    type_name: str

    def __repr__(self) -> str:
        return f"<{self.type_name}>"


@dataclass(frozen=True)
class Executed:
    """What a file holds.

    Attributes:
        path: The file as it was named.
        text: Its text.
        values: Top-level names with plain data, in the order of their first assignment.
        places: Line of each name and nested key.
        replaced: Constants of `--set` that some file assigned.
    """

    path: str
    text: str
    values: dict[str, Any]
    places: Places
    replaced: frozenset[str]


def execute(path: str | os.PathLike[str], *, replacements: Mapping[str, Any] | None = None) -> Executed:
    """Run a configuration file.

    Args:
        path: The file; `__file__` is its absolute path while it runs.
        replacements: Values that replace top-level names whenever the file, or a base file, assigns them.
    Raises:
        ConfigError: There is no such file, or it raised an error, which is named with its line.
    """
    run = _Run(os.fspath(path), dict(replacements or {}))
    text = _read(run.path, shown=os.fspath(path))
    module = types.ModuleType(os.path.splitext(os.path.basename(run.path))[0])
    module.__file__ = run.path
    with run.installed():
        try:
            namespace = run.execute_into(module, run.path, text)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise _as_config_error(error, run, shown=os.fspath(path)) from error
    values = {name: plain(value) for name, value in namespace.items() if _is_data(name, value)}
    return Executed(os.fspath(path), text, values, run.places[module.__name__], frozenset(run.replaced))


class _Namespace(dict[str, Any]):
    """Globals of a running file, in which some constants cannot be assigned anything but their replacement."""

    def __init__(self, run: _Run, start: Mapping[str, Any]):
        super().__init__(start)
        self._run = run

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._run.replacements:
            self._run.replaced.add(name)
            value = self._run.replacements[name]
        super().__setitem__(name, value)


class _Run:
    """One execution: the main file, the files it imports, and what they assign."""

    def __init__(self, path: str, replacements: dict[str, Any]):
        self.path = os.path.abspath(path)
        self.folder = os.path.dirname(self.path)
        self.replacements = replacements
        self.replaced: set[str] = set()
        self.places: dict[str, Places] = {}
        self.files: set[str] = set()
        self._loaded: set[str] = set()
        self._ran: set[int] = set()

    def execute_into(self, module: types.ModuleType, path: str, text: str) -> _Namespace:
        """Run a file's code in a module's namespace, and find its places."""
        self.files.add(path)
        tree = ast.parse(text, filename=path)
        mark_branches(tree)
        namespace = _Namespace(self, module.__dict__)
        dict.__setitem__(namespace, RAN, self._ran.add)
        exec(compile(tree, path, "exec", dont_inherit=True), namespace)
        self.places[module.__name__] = collect(
            tree,
            file=None if path == self.path else path,
            modules=self.places,
            package=getattr(module, "__package__", None) or "",
            ran=self._ran,
        )
        return namespace

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Make base files importable; put everything back behind."""
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in _OWN_ROOTS}
        path = list(sys.path)
        sys.meta_path.insert(0, self)
        try:
            # a file that prints must not mix its words into a JSON on stdout
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            sys.meta_path.remove(self)
            sys.path[:] = path
            for name in self._loaded:
                sys.modules.pop(name, None)
            sys.modules.update(hidden)

    # what Python's import system asks of a finder and loader

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if root == "internlm":
            if fullname not in _STUBS:
                raise _ForbiddenImport(fullname)
            return self._spec(fullname, None, folders=[] if fullname != _STUBS[-1] else None)
        if root == "configs" and not rest:
            return self._spec(fullname, None, folders=self._configs_folders())
        if path is None and fullname not in sys.stdlib_module_names:
            return self._find_in([self.folder], fullname, fullname)
        if root in self._loaded:
            return self._find_in(list(path or ()), fullname.rpartition(".")[2], fullname)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == _STUBS[-1]:
            module.__dict__["read_base"] = _read_base
        path = module.__spec__.loader_state if module.__spec__ else None
        if path is not None:
            namespace = self.execute_into(module, path, _read(path, shown=path))
            module.__dict__.update(namespace)

    def _spec(self, fullname: str, file: str | None, *, folders: list[str] | None) -> ModuleSpec:
        self._loaded.add(fullname)
        # the path is kept beside `origin`: a module without a file is a namespace to Python
        spec = ModuleSpec(fullname, self, origin=file, loader_state=file, is_package=folders is not None)  # type: ignore[arg-type]
        spec.has_location = file is not None
        if folders is not None:
            spec.submodule_search_locations = folders
        return spec

    def _configs_folders(self) -> list[str]:
        """`configs` folders above the file, nearest first, then that of the current directory."""
        parents, folder = [], self.folder
        while True:
            parents.append(folder)
            above = os.path.dirname(folder)
            if above == folder:
                break
            folder = above
        found = [os.path.join(parent, "configs") for parent in (*parents, os.getcwd())]
        return list(dict.fromkeys(folder for folder in found if os.path.isdir(folder)))

    def _find_in(self, folders: Sequence[str], name: str, fullname: str) -> ModuleSpec | None:
        packages = []
        for folder in folders:
            file = os.path.join(folder, name + ".py")
            if os.path.isfile(file):
                return self._spec(fullname, file, folders=None)
            inner = os.path.join(folder, name)
            if os.path.isfile(os.path.join(inner, "__init__.py")):
                return self._spec(fullname, os.path.join(inner, "__init__.py"), folders=[inner])
            if os.path.isdir(inner) and "." in fullname:
                packages.append(inner)
        if packages:
            return self._spec(fullname, None, folders=packages)
        if fullname.startswith("configs."):
            file = os.path.join(*fullname.split(".")) + ".py"
            message = f"no {file} in any folder above {self.path} nor in {os.getcwd()}"
            raise ModuleNotFoundError(message, name=fullname)
        return None


class _ForbiddenImport(ImportError):
    def __init__(self, name: str):
        super().__init__(
            "a configuration may import only internlm.utils.utils.read_base from the reference; "
            "for MODEL_INITIALIZER write `from internlm_ds.registry import MODEL_INITIALIZER`",
            name=name,
        )


@contextlib.contextmanager
def _read_base() -> Iterator[None]:
    """`with read_base(): from configs._base_.x import *`"""
    yield


def _read(path: str, *, shown: str) -> str:
    if not path.endswith(".py"):
        raise ConfigError(f"{shown}: a configuration is a Python file that ends with .py")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ConfigError(f"{shown}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    import io
    import tokenize

    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read as text ({error}); save it as UTF-8") from None


def _is_data(name: str, value: Any) -> bool:
    if name.startswith("__"):
        return False
    return not isinstance(value, type | types.ModuleType | types.FunctionType | types.BuiltinFunctionType)


def plain(value: Any) -> Any:
    """Plain data of a value: paths, numpy scalars and torch dtypes are read as such; what is left becomes `Opaque`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    for base in (bool, int, float, str):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return plain(value.item())
    return Opaque(getattr(value, "__name__", type(value).__name__))


def _as_config_error(error: BaseException, run: _Run, *, shown: str) -> ConfigError:
    """The error of a file as one problem with its line."""
    key, message = type(error).__name__, str(error) or "raised by the file"
    file, line = _last_place(error, run.files)
    if isinstance(error, SyntaxError) and error.filename in run.files:
        key, message = "syntax", str(error.msg)
        file, line = error.filename, error.lineno
    elif isinstance(error, _ForbiddenImport):
        key = f"import {error.name}"
    problem = Problem(key, message, line=line, path=None if file == run.path else file, has_value=False)
    return ConfigError([problem], path=shown)


def _last_place(error: BaseException, files: set[str]) -> tuple[str | None, int | None]:
    """The deepest line of the configuration's own files in a traceback."""
    found: tuple[str | None, int | None] = (None, None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in files:
            found = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found
