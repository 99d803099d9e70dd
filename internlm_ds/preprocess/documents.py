"""Texts of an input file, one document at a time, each with the line it begins on.

Two readers: `read_documents` for people, `read_reference_documents` for `--compat reference`. Bytes and compression
belong to `files`, the incremental JSON list to `json_stream`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.files import SourceFile, numbered_lines, text_kind
from internlm_ds.preprocess.json_stream import list_elements

DEFAULT_TEXT_KEYS = ("text", "content")
_BATCH_CHARS = 1 << 18
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Document:
    """A text, and the number (from 1) of the line of its file on which it begins."""

    text: str
    line: int


def read_documents(source: SourceFile, *, text_key: str | None = None) -> Iterator[Document]:
    """Documents of a file: the stripped lines of a .txt that hold something, the text field of each JSON record.

    Args:
        text_key: Field that holds the text; None takes `text`, then `content`. A record may be a plain string.

    Texts of JSON records come as they are, empty ones too: the caller counts what it leaves out.

    Raises:
        DataFormatError: With file and line: no UTF-8, no JSON, a record without the field, a text that is no string.
    """
    kind = text_kind(source.path)
    with source.open() as stream:
        if kind == "txt":
            for line, text in numbered_lines(stream, path=source.path):
                if stripped := text.strip():
                    yield Document(stripped, line)
            return
        for line, value in records(stream, kind=kind, path=source.path):
            yield Document(text_of(value, text_key, path=source.path, line=line), line)


def read_reference_documents(source: SourceFile) -> Iterator[Document]:
    """Documents as InternEvo's tool reads them: `json.dumps` of each record, jsonl lines with their newline.

    Source: InternEvo `tools/tokenizer.py`; blank jsonl lines are documents, `\\uXXXX` escapes stay escapes.
    """
    kind = text_kind(source.path)
    with source.open() as stream:
        if kind == "json":
            for line, value in list_elements(stream, path=source.path):
                yield Document(json.dumps(value), line)
            return
        for line, text in numbered_lines(stream, path=source.path, keep_bom=True):
            if kind == "jsonl":
                yield Document(text, line)
            elif stripped := text.strip():
                yield Document(stripped, line)


def records(stream: IO[str], *, kind: str, path: str) -> Iterator[tuple[int, Any]]:
    """JSON values of a list (`kind` "json") or of lines ("jsonl", blank ones skipped), with their line numbers."""
    if kind == "json":
        yield from list_elements(stream, path=path)
        return
    for line, text in numbered_lines(stream, path=path):
        if text.strip():
            yield line, record_of_line(text, path, line)


def record_of_line(text: str, path: str, line: int) -> Any:
    """The JSON value on a line.

    Raises:
        DataFormatError: There is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        message = f"no JSON: {what}; a .jsonl input holds one record a line"
        raise DataFormatError(message, path=path, line=line) from None


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents, large enough to encode together, small enough to hold."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def string_field(record: dict[str, Any], key: str, *, path: str, line: int) -> str:
    """The string under a key that the record has.

    Raises:
        DataFormatError: It is no string, or one that is no text (a lone surrogate).
    """
    return _checked_text(record[key], f'the field "{key}"', path=path, line=line)


def text_of(value: Any, text_key: str | None, *, path: str, line: int) -> str:
    """The text of a record: the field `text_key` (None: `text`, then `content`) of an object, or the string it is.

    Raises:
        DataFormatError: It has none.
    """
    if isinstance(value, str):
        return _checked_text(value, "the text", path=path, line=line)
    if not isinstance(value, dict):
        message = f"a record is an object with a text field, or a string; this is {_kind_of(value)}"
        raise DataFormatError(message, path=path, line=line)
    keys = (text_key,) if text_key is not None else DEFAULT_TEXT_KEYS
    for key in keys:
        if key in value:
            return string_field(value, key, path=path, line=line)
    wanted = " or ".join(f'"{key}"' for key in keys)
    has = ", ".join(f'"{key}"' for key in list(value)[:8]) or "none"
    message = f"this record has no field {wanted}; its fields: {has}. Name the one that holds the text with --text-key"
    raise DataFormatError(message, path=path, line=line)


def _checked_text(value: Any, what: str, *, path: str, line: int) -> str:
    if not isinstance(value, str):
        raise DataFormatError(f"{what} is {_kind_of(value)}, a string is needed", path=path, line=line)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"\\u{ord(value[error.start]):04x}"
        message = f"{what} holds half a surrogate pair ({found}), which is no character; mend the escape"
        raise DataFormatError(message, path=path, line=line) from None
    return value


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
