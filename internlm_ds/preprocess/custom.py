"""Your own format: a function that turns a record into what a sample is made of.

::

    from internlm_ds.preprocess.custom import control

    def make_sample(record):
        return [(f"Question: {record['q']}\\n", False), (record["a"], True), (control("<eoa>"), True)]

An element is `(content, learned)`: a text, an id, a list of ids, or `control("<piece>")`, and whether the model shall
learn to write it. None leaves the record out. bos and eos are put around the sample, the eos learned if the last
element is. A text that spells out a control piece stays text. The function is called twice for each record, and must
answer the same.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.samples import Frame
from internlm_ds.preprocess.segments import Control, Part
from internlm_ds.preprocess.sft import Place, Recipe

__all__ = ["Control", "control", "custom_recipe", "load_function"]

MakeSample = Callable[[Any], Any]


def control(name: str) -> Control:
    """A piece of the model by its name; an error where the model lacks it."""
    return Control(name)


def load_function(address: str) -> MakeSample:
    """The function that `FILE.py:NAME` names.

    Raises:
        DataFormatError: There is no such file or function, or the file cannot be executed.
    """
    file, _, name = address.rpartition(":")
    if not file or not name.isidentifier():
        raise DataFormatError(f"--function {address}: write FILE.py:NAME, such as mine.py:make_sample")
    if not os.path.isfile(file):
        raise DataFormatError(f"--function {address}: no such file", path=file)
    found = getattr(_execute(Path(file)), name, None)
    if not callable(found):
        raise DataFormatError(f"--function {address}: the file has no function {name}", path=file)
    function: MakeSample = found
    return function


def _execute(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"internlm_ds_custom_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise DataFormatError("a Python file is needed, its name ends in .py", path=str(file))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise DataFormatError(message, path=str(file), line=_line_in(error, str(file))) from error
    return module


def custom_recipe(function: MakeSample, *, name: str, frame: Frame, vocab_size: int) -> Recipe:
    """Samples as the user's function makes them.

    Args:
        name: What the provenance file calls it, such as `mine.py:make_sample`.
        vocab_size: Ids must be below.
    """

    def parts(record: Any, place: Place) -> list[Part] | None:
        try:
            made = function(record)
        except Exception as error:
            file = function.__code__.co_filename if hasattr(function, "__code__") else ""
            line = _line_in(error, file)
            where = f"{name}, line {line}" if line else name
            raise place.error(f"{where} raised {type(error).__name__}: {error}") from error
        return None if made is None else _checked(made, place, name=name, vocab_size=vocab_size)

    return Recipe(kind="custom", parts=parts, frame=frame, settings={"function": name})


def _checked(made: Any, place: Place, *, name: str, vocab_size: int) -> list[Part]:
    if not isinstance(made, (list, tuple)) or not made:
        raise place.error(f'{name} returned {made!r:.80}; a list such as [("text", True)] is needed, or None')
    return [_part(element, place, name=name, vocab_size=vocab_size) for element in made]


def _part(element: Any, place: Place, *, name: str, vocab_size: int) -> Part:
    if not isinstance(element, (list, tuple)) or len(element) != 2 or not isinstance(element[1], bool):
        raise place.error(f"{name} returned the element {element!r:.80}; (content, True or False) is needed")
    content, learned = element
    if isinstance(content, Control):
        return Part(content, learned)
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError:
            raise place.error(f"{name} returned a text that holds half a surrogate pair: {content!r:.80}") from None
        return Part(content, learned)
    ids = _ids(content, vocab_size)
    if ids is None:
        known = f'a text, an id (0 to {vocab_size - 1}), a list of ids or control("<piece>")'
        raise place.error(f"{name} returned the content {content!r:.80}; {known} is needed")
    return Part(ids, learned)


def _ids(content: Any, vocab_size: int) -> tuple[int, ...] | None:
    """Ids as plain integers; None where it is something else, or outside the vocabulary."""
    values: Sequence[Any] = content if isinstance(content, (list, tuple)) else [content]
    if any(isinstance(value, bool) or not hasattr(value, "__index__") for value in values):
        return None
    ids = tuple(value.__index__() for value in values)
    return ids if all(0 <= number < vocab_size for number in ids) else None


def _line_in(error: BaseException, file: str) -> int | None:
    """The last line of `file` on the way to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    return lines[-1] if lines else None
