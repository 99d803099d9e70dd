"""Texts that are too long to be encoded whole: where they may be cut, and their parts.

A text may be cut between two characters that stand side by side in no piece of the model: no merge ever joins them,
whatever stands around them. The ids of the parts, one behind the other, are those of the whole text then. This holds
for the models of `engine.model_file.why_not`; texts of other models are never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.engine.model_file import parse, why_not
from internlm_ds.preprocess.tokenizers import Tokenizer
from internlm_ds.preprocess.window import Window

MAX_CHARS = 16_000_000
_SEARCHED_BYTES = 1 << 16
_SPACE = "\u2581"


class Cuts:
    """The neighbours that some piece of a model holds side by side."""

    def __init__(self, pieces: Iterable[str]):
        self._joined = {pair for piece in pieces for pair in pairwise(piece)}

    def last(self, data: bytes) -> int:
        """The last place where `data` may be cut, behind a character that is no blank; 0 where there is none.

        Bytes that are no UTF-8 are no characters to cut between; the reader of the part names them.
        """
        start = max(0, len(data) - _SEARCHED_BYTES)
        while start < len(data) and data[start] & 0xC0 == 0x80:
            start += 1
        text = data[start:].decode("utf-8", "surrogateescape").replace(" ", _SPACE)
        for i in range(len(text) - 2, 0, -1):
            left, right = text[i - 1], text[i]
            if (left, right) in self._joined or left.isspace() or left == _SPACE or "\ud800" <= right <= "\udfff":
                continue
            return start + len(text[:i].replace(_SPACE, " ").encode("utf-8", "surrogateescape"))
        return 0


def cuts_of(tokenizer: Tokenizer) -> Cuts | None:
    """Where texts may be cut for a model; None if nowhere."""
    if tokenizer.library != "sentencepiece":
        return None
    try:
        model = parse(Path(tokenizer.path).read_bytes())
    except (OSError, ValueError):
        return None
    return None if why_not(model, max_pieces=len(model.pieces)) else Cuts(piece.text for piece in model.pieces)


def parts(
    peek: Callable[[int], bytes],
    take: Callable[[int], bytes],
    cuts: Callable[[], Cuts | None],
    *,
    path: str,
    line: int,
    part_bytes: int,
) -> Iterator[tuple[bytes, bool]]:
    """The text in parts of about `part_bytes`, each with whether it is the last.

    Args:
        peek: The next bytes of the text, as many as asked for or up to its end.
        take: The same bytes, used up.

    Raises:
        DataFormatError: There is no place to cut within `MAX_CHARS` characters.
    """
    while True:
        size = part_bytes
        while len(seen := peek(size)) == size:
            table = cuts()
            if place := table.last(seen) if table else 0:
                yield take(place), False
                break
            check_length(seen, path=path, line=line)
            size *= 2
        else:
            check_length(seen, path=path, line=line)
            yield take(len(seen)), True
            return


def check_length(text: bytes, *, path: str, line: int) -> None:
    """Refuse a text, or a stretch of one, that has to be encoded whole and is too long for that."""
    if len(text) <= MAX_CHARS:
        return
    chars = int(np.count_nonzero(np.frombuffer(text, dtype=np.uint8) & 0xC0 != 0x80))
    if chars > MAX_CHARS:
        message = f"more than {MAX_CHARS} characters in which the tokenizer can join any two neighbours (or cannot be "
        message += "cut at all); split this text"
        raise DataFormatError(message, path=path, line=line or None)


def line_parts(
    window: Window, cuts: Callable[[], Cuts | None], *, path: str, part_bytes: int
) -> Iterator[tuple[bytes, bool]]:
    """The next line of a window in parts, stripped; nothing if it is blank. The window stands behind the line then."""
    line = window.line
    while margin := _blanks_before(window.peek(part_bytes + 3)):  # at least a whole character
        window.take(margin)
    if window.peek(1):
        for part, is_last in parts(window.peek, window.take, cuts, path=path, line=line, part_bytes=part_bytes):
            yield _without_blanks_behind(part) if is_last else part, is_last
    window.next_line()


def _blanks_before(head: bytes) -> int:
    """Bytes of the blanks at the beginning; one that the end of `head` cuts is not among them."""
    text = head.decode("utf-8", "surrogateescape")
    return len(head) - len(text.lstrip().encode("utf-8", "surrogateescape"))


def _without_blanks_behind(part: bytes) -> bytes:
    return part.decode("utf-8", "surrogateescape").rstrip().encode("utf-8", "surrogateescape")


def text_parts(
    text: bytes, cuts: Callable[[], Cuts | None], *, path: str, line: int, part_bytes: int
) -> Iterator[tuple[bytes, bool]]:
    """A text at hand in parts."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        return text[at - count : at]

    yield from parts(lambda size: text[at : at + size], take, cuts, path=path, line=line, part_bytes=part_bytes)
