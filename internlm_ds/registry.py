"""Model types by name: how users add their own without touching this package. Imports no torch.

A builder gets the `model` dict of the configuration as keywords and returns layer entries (or a plain module on one
stage without tensor parallelism). Builders may be named as `"module:function"`, so that a configuration can mention one
without importing it; it is resolved when the model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from internlm_ds.errors import ConfigError

Builder = Callable[..., Any]
_B = TypeVar("_B", bound="Builder | str")


class Registry:
    """Builders by name.

    >>> models = Registry("model type")
    >>> @models.register_module(module_name="MINE")
    ... def build(**model): return model
    >>> models.get("MINE")(hidden_size=8)
    {'hidden_size': 8}
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._builders: dict[str, Builder | str] = {}

    def register_module(self, module_name: str) -> Callable[[_B], _B]:
        """A decorator for a builder, also callable with the name of one, `"module:function"`.

        Registering a name again is an error, unless it is the same builder (a configuration may be loaded twice).

        Raises (when applied):
            ConfigError: The name is taken by another builder, or the builder is neither callable nor such a name.
        """

        def register(builder: _B) -> _B:
            if isinstance(builder, str):
                _split(builder, kind=self.kind, name=module_name)
            elif not callable(builder):
                raise ConfigError(f'{self.kind} {module_name!r}: {builder!r} is neither callable nor "module:function"')
            known = self._builders.get(module_name)
            if known is not None and _identity(known) != _identity(builder):
                raise ConfigError(
                    f"{self.kind} {module_name!r} is already registered as {_identity(known)}; choose another name"
                )
            self._builders[module_name] = builder
            return builder

        return register

    def has(self, name: str) -> bool:
        return name in self

    def __contains__(self, name: object) -> bool:
        return name in self._builders or (isinstance(name, str) and _looks_like_path(name))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._builders)

    def get(self, name: str) -> Builder:
        """The builder of a name, or the one that `"module:function"` itself names.

        Raises:
            ConfigError: The name is not registered, or its module or function cannot be found.
        """
        builder = self._builders.get(name, name if _looks_like_path(name) else None)
        if builder is None:
            known = ", ".join(self._builders) or "none"
            raise ConfigError(f"{self.kind} {name!r} is not registered; registered: {known}")
        return _resolve(builder, kind=self.kind, name=name) if isinstance(builder, str) else builder


def _looks_like_path(name: str) -> bool:
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *function.split(".")))


def _split(path: str, *, kind: str, name: str) -> tuple[str, str]:
    if not _looks_like_path(path):
        raise ConfigError(f'{kind} {name!r}: a builder is named as "module:function", not {path!r}')
    module, _, function = path.partition(":")
    return module, function


def _resolve(path: str, *, kind: str, name: str) -> Builder:
    module_name, function = _split(path, kind=kind, name=name)
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{kind} {name!r}: cannot import {module_name} ({error}); is it on PYTHONPATH?") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{kind} {name!r}: module {module_name} has no {function}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{kind} {name!r}: {path} is not callable")
    return found  # type: ignore[no-any-return]


def _identity(builder: Builder | str) -> str:
    """Where a builder is defined; equal for the same function executed twice."""
    if isinstance(builder, str):
        return builder
    code = getattr(builder, "__code__", None)
    file = code.co_filename if code is not None else getattr(builder, "__module__", "")
    return f"{file}:{getattr(builder, '__qualname__', repr(builder))}"


MODEL_INITIALIZER = Registry("model type")
"""Model types that users add. InternLM's own need no entry."""
