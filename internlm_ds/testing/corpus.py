"""Real text that every machine with Python has: the standard library's sources, and documentation beside it.

The demo trains on it. What is read is bounded, and spread over all files instead of their alphabetical beginning.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

# tests and tables are large and teach little
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"})
SKIPPED_FOLDERS |= {"lib2to3", "pydoc_data", "idle_test", "turtledemo", "config"}
LEGAL_WORDS = ("licen", "copying", "notice", "authors", "third_party")


def standard_library() -> Iterator[tuple[str, str]]:
    """`(name, text)` of the Python sources of the interpreter that runs."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(name.parts):
            yield from _read(path, name.as_posix())


def documentation() -> Iterator[tuple[str, str]]:
    """`(name, text)` of English texts: the interpreter's help topics, the installed packages' descriptions and docs."""
    yield from _help_topics()
    root = Path(sysconfig.get_path("purelib"))
    for path in sorted(root.glob("*.dist-info/METADATA")):
        for name, text in _read(path, path.parent.name):
            yield name, text.partition("\n\n")[2]  # the description stands behind the header
    for suffix in ("rst", "md", "txt"):
        for path in sorted(root.rglob(f"*.{suffix}")):
            name = path.relative_to(root).as_posix()
            if ".dist-info" not in name and not any(word in name.lower() for word in LEGAL_WORDS):
                yield from _read(path, name)


def pieces(texts: Iterable[tuple[str, str]], *, max_chars: int, piece_chars: int = 2000) -> list[str]:
    """Texts cut at line ends into pieces, each once, in an order that follows no alphabet, `max_chars` in all.

    >>> pieces([("a", "one\\ntwo\\n"), ("b", "one\\n")], max_chars=8, piece_chars=4)
    ['two\\n', 'one\\n']
    """
    found = {piece for _, text in texts for piece in _cut(text, piece_chars)}
    chosen, left = [], max_chars
    for piece in sorted(found, key=_digest):
        if len(piece) <= left:
            chosen.append(piece)
            left -= len(piece)
    return chosen


def _help_topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # some distributions pack it apart
        return
    yield from sorted(topics.items())


def _read(path: Path, name: str) -> Iterator[tuple[str, str]]:
    try:
        yield name, path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return


def _cut(text: str, size: int) -> Iterator[str]:
    """Runs of whole lines of about `size` characters."""
    piece: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        if piece and length + len(line) > size:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if piece:
        yield "".join(piece)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
