"""An input file as pieces that can be encoded apart, and a piece as a block of texts.

Cutting a file into pieces is one thread's work and looks for line ends only; what stands in a piece (lines, records,
blanks, errors) is found by `split` on any thread. `documents` is the slow reader that says what must come out. Pieces
depend on the file, the model and the size of a block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.blanks import stripped_lines
from internlm_ds.preprocess.documents import Document, read_documents, record_of_line, text_of
from internlm_ds.preprocess.files import SourceFile, not_utf8, text_kind
from internlm_ds.preprocess.longtext import Cuts, line_parts, text_parts
from internlm_ds.preprocess.rows import TextBlock
from internlm_ds.preprocess.window import Window, count_lines

BLOCK_BYTES = 1 << 18
_LONG = 8  # texts of so many blocks are encoded in parts
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Some texts of a source, or a part of one that is too long to be held whole.

    Attributes:
        kind: "txt" or "jsonl": `data` is bytes of whole lines; "texts": a tuple of texts; "part": bytes of one text.
        line: Number of the line on which `data` begins; of the whole text for a part.
        begins, ends: For a part: nothing of its text comes before it, behind it.
    """

    kind: str
    data: bytes | tuple[str, ...]
    path: str
    line: int
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class Split:
    """The texts of a piece, and how many empty ones were left out."""

    block: TextBlock
    empty: int = 0


def pieces(
    source: SourceFile, *, text_key: str | None, cuts: Callable[[], Cuts | None], block_bytes: int = BLOCK_BYTES
) -> Iterator[Piece]:
    """All of a file, in order.

    Args:
        cuts: Where a long text may be cut, asked for when there is one.

    Raises:
        DataFormatError: The file cannot be read; a long text cannot be cut, a record of a .json list is none.
    """
    kind = text_kind(source.path)
    if kind == "json":
        yield from text_pieces(read_documents(source, text_key=text_key), source.path, cuts, block_bytes)
        return
    window = Window(source.chunks())
    window.drop(_BOM)
    line = 1
    while not window.is_empty():
        if data := window.whole_lines(block_bytes):
            yield Piece(kind, data, source.path, line)
        elif len(window.peek(_LONG * block_bytes)) < _LONG * block_bytes:
            yield Piece(kind, window.next_line(), source.path, line)
        elif kind == "txt":
            found = line_parts(window, cuts, path=source.path, part_bytes=block_bytes)
            yield from _parts(found, source.path, line)
        else:
            record = _long_record(window, source.path, text_key)
            yield from text_pieces(record, source.path, cuts, block_bytes)
        line = window.line


def _long_record(window: Window, path: str, text_key: str | None) -> Iterator[Document]:
    """The text of the record on the next line, if that is not blank; no other copy of it is kept."""
    line = window.line
    text = _decoded(window.next_line(), path, line)
    if not text.isspace():
        value = record_of_line(text, path, line)
        del text
        found = [Document(text_of(value, text_key, path=path, line=line), line)]
        del value
        yield found.pop()


def text_pieces(
    documents: Iterable[Document], path: str, cuts: Callable[[], Cuts | None], block_bytes: int
) -> Iterator[Piece]:
    """Texts that are strings already, together up to about the size of a block."""
    held: list[str] = []
    size = line = 0
    for document in documents:
        line, size = line or document.line, size + len(document.text)
        if len(document.text) <= _LONG * block_bytes:
            held.append(document.text)
        if size >= block_bytes:
            yield Piece("texts", tuple(held), path, line)
            held, size, line = [], 0, 0
        if len(document.text) > _LONG * block_bytes:
            data, first_line = document.text.encode(), document.line
            del document
            found = text_parts(data, cuts, path=path, line=first_line, part_bytes=block_bytes)
            yield from _parts(found, path, first_line)
    if held:
        yield Piece("texts", tuple(held), path, line)


def _parts(found: Iterable[tuple[bytes, bool]], path: str, line: int) -> Iterator[Piece]:
    begins = True
    for data, is_last in found:
        yield Piece("part", data, path, line, begins, is_last)
        begins = False


def split(piece: Piece, *, text_key: str | None, keep_empty: bool = False) -> Split:
    """The texts of a piece: of lines stripped and not blank, of records not blank, of a part its text.

    Args:
        keep_empty: Leave no text of a "texts" piece out.

    Raises:
        DataFormatError: With file and line: no UTF-8, no JSON, no text.
    """
    if isinstance(piece.data, tuple):
        return _of_texts(piece.data, keep_empty=keep_empty)
    if piece.kind == "jsonl":
        return _of_texts(_texts_of_records(piece.data, piece, text_key), keep_empty=False)
    _decoded(piece.data, piece.path, piece.line)
    if piece.kind == "part":
        count = int(bool(piece.data))
        return Split(TextBlock(piece.data, np.zeros(count, np.int64), np.full(count, len(piece.data), np.int64)))
    return Split(TextBlock(piece.data, *stripped_lines(piece.data)))


def _decoded(data: bytes, path: str, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong_byte(data, error.start, path, line) from None


def _wrong_byte(data: bytes, place: int, path: str, line: int) -> DataFormatError:
    """`line` is that on which the data begins."""
    return not_utf8(data[place], path=path, line=line + count_lines(data[:place]))


def _texts_of_records(data: bytes, piece: Piece, text_key: str | None) -> Iterator[str]:
    """The text of every record; of several lines that are wrong the first one is named."""
    wrong = None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = _wrong_byte(data, error.start, piece.path, piece.line)
        text = data[: 1 + max(data.rfind(end, 0, error.start) for end in (b"\n", b"\r"))].decode("utf-8")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    for line, record in enumerate(text.split("\n"), start=piece.line):
        if record and not record.isspace():
            yield text_of(record_of_line(record, piece.path, line), text_key, path=piece.path, line=line)
    if wrong is not None:
        raise wrong


def _of_texts(texts: Iterable[str], *, keep_empty: bool) -> Split:
    kept, empty = [], 0
    for text in texts:
        if keep_empty or (text and not text.isspace()):
            kept.append(text)
        else:
            empty += 1
    return Split(TextBlock.of(kept), empty)
