"""Elements of a top-level JSON list, one at a time: memory is the largest element, not the file.

Built on the standard decoder, which says where one value ends; this file feeds it text as it is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.files import check_utf8

_CHUNK_CHARS = 1 << 16
_BLANKS = re.compile(r"[ \t\n\r]*")
# A value that the buffer cuts makes the decoder stumble this close to the buffer's end (`-Infinity`, a surrogate pair
# of escapes); an error further from it is a real one.
_LONGEST_ATOM = 32


def list_elements(stream: IO[str], *, path: str) -> Iterator[tuple[int, Any]]:
    """Elements of the list with the number of the line on which each begins (from 1).

    Raises:
        DataFormatError: The text is no JSON, or no list.
    """
    text = _Buffer(stream, path=path)
    if text.peek() == "\ufeff":
        text.skip(1)
    if text.peek() != "[":
        message = "a .json input is one list of records, [{…}, {…}]; with one record a line, name the file .jsonl"
        raise text.error(message if text.peek() else "an empty file is no JSON")
    text.skip(1)
    separator = "["
    while (found := text.peek()) != "]" or separator == ",":
        yield text.line, text.value()
        separator = text.peek()
        if separator == ",":
            text.skip(1)
        elif separator != "]":
            raise text.error("',' or ']' expected behind an element" + _seen(separator))
    text.skip(1)
    if found := text.peek():
        raise text.error("the list has ended, nothing may follow" + _seen(found))


def _seen(character: str) -> str:
    return f", found {character!r}" if character else ", the file ends here"


class _Buffer:
    """The part of the text that has been read but not used, and the line it begins on."""

    def __init__(self, stream: IO[str], *, path: str):
        self._stream, self._path = stream, path
        self._text, self._position, self._ended = "", 0, False
        self.line = 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._position)
            self.skip(len(blanks.group()) if blanks else 0)
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._read(_CHUNK_CHARS)

    def skip(self, count: int) -> None:
        self.line += self._text.count("\n", self._position, self._position + count)
        self._position += count

    def value(self) -> Any:
        """The value that begins here; reads on, twice as far each time, until it is whole."""
        self.peek()
        amount = _CHUNK_CHARS
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_ATOM
                if self._ended or not cut:
                    raise self._syntax_error(error) from None
            except (ValueError, RecursionError) as error:
                raise self.error(f"unusable JSON: {error}") from None
            else:
                # a number that touches the end of the buffer may go on behind it
                if self._ended or end < len(self._text) - _LONGEST_ATOM:
                    self.skip(end - self._position)
                    return found
            self._read(amount)
            amount *= 2

    def error(self, message: str) -> DataFormatError:
        return DataFormatError(message, path=self._path, line=self.line)

    def _syntax_error(self, error: json.JSONDecodeError) -> DataFormatError:
        line = self.line + self._text.count("\n", self._position, error.pos)
        ended = " (the file ends here)" if error.pos >= len(self._text) else ""
        return DataFormatError(f"no JSON: {error.msg}{ended}", path=self._path, line=line)

    def _read(self, amount: int) -> None:
        chunk = self._stream.read(amount)
        self._text, self._position = self._text[self._position :], 0
        check_utf8(chunk, path=self._path, line=self.line + self._text.count("\n"))
        self._text += chunk
        self._ended = not chunk
