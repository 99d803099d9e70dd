#!/usr/bin/env python
"""A text of Chinese, English and code from files of this machine, for the benchmarks: one document a line.

`python benchmarks/corpus.py mixed.txt --megabytes 20` takes 40 % Chinese, 30 % source of Python's library and 30 %
English documentation, in turn. The same files give the same bytes; the sha1 is printed, compare it before comparing
figures of two machines. Where the machine has too little of a kind, the others fill up and the shares are printed.

Chinese text comes with Debian's packages `fortunes-zh`, `manpages-zh` and `debian-reference-zh-cn`; unpacked somewhere
(`apt-get download`, `dpkg-deb -x`), name that folder with `--root`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

SHARES = {"chinese": 0.4, "code": 0.3, "english": 0.3}
FOLDERS = ("usr/share/games/fortunes", "usr/share/debian-reference", "usr/share/man/zh_CN", "usr/share/man/zh_TW")
ENGLISH_FOLDERS = ("usr/share/doc",)
_HAN = re.compile(r"[\u4e00-\u9fff]")
_ENOUGH_HAN = 0.1  # of a file's characters


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", help="text file to write")
    parser.add_argument("--megabytes", type=float, default=20.0, help="its size (default %(default)s)")
    parser.add_argument("--root", action="append", default=[], metavar="DIR", help="a folder to search like /; repeats")
    args = parser.parse_args(argv)
    print(write(Path(args.output), megabytes=args.megabytes, roots=args.root))
    return 0


def write(output: Path, *, megabytes: float = 20.0, roots: Sequence[str] = ()) -> str:
    """Make the corpus; returns its size, shares and sha1 in words. One of 100 MB and more repeats itself."""
    parts = collect(int(megabytes * 1e6), roots=[*roots, "/"])
    content = b"".join(interleaved(parts))
    wanted = int(megabytes * 1e6)
    output.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha1(), 0
    with output.open("wb") as file:
        while written < wanted and content:
            piece = (
                content
                if written + len(content) <= wanted
                else content[: content.rfind(b"\n", 0, wanted - written) + 1]
            )
            if not piece:
                break
            file.write(piece)
            digest.update(piece)
            written += len(piece)
    total = sum(map(len, content and [b"".join(p) for p in parts.values()])) or 1
    shares = ", ".join(f"{name} {100 * sum(map(len, texts)) / total:.0f} %" for name, texts in parts.items())
    return f"{output}: {written / 1e6:.1f} MB ({shares}), sha1 {digest.hexdigest()}"


def collect(wanted: int, *, roots: Sequence[str]) -> dict[str, list[bytes]]:
    """Texts by kind, each a whole file; what one kind lacks the others give."""
    sources = {
        "chinese": (text for text in _texts(roots, FOLDERS) if _is_chinese(text)),
        "code": _read_all(sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))),
        "english": (text for text in _texts(roots, ENGLISH_FOLDERS) if text.isascii()),
    }
    parts: dict[str, list[bytes]] = {}
    left, left_share = wanted, 1.0
    for name, share in SHARES.items():
        parts[name] = _take(sources[name], int(left * share / left_share))
        left, left_share = left - sum(map(len, parts[name])), left_share - share
    return parts


def interleaved(parts: dict[str, list[bytes]]) -> Iterator[bytes]:
    """All texts, the kinds mixed evenly: always from the kind of which the smallest share is out."""
    totals = {name: sum(map(len, texts)) or 1 for name, texts in parts.items()}
    done = dict.fromkeys(parts, 0)
    waiting = {name: list(reversed(texts)) for name, texts in parts.items()}
    while any(waiting.values()):
        name = min((n for n in waiting if waiting[n]), key=lambda n: (done[n] / totals[n], n))
        text = waiting[name].pop()
        done[name] += len(text)
        yield text


def _take(texts: Iterator[str], wanted: int) -> list[bytes]:
    """Whole lines of distinct texts until so many bytes are there."""
    taken: list[bytes] = []
    seen: set[bytes] = set()
    for text in texts:
        lines = [line for line in (line.strip() for line in text.splitlines()) if line]
        content = "".join(line + "\n" for line in lines).encode()
        fingerprint = hashlib.sha1(content).digest()
        if fingerprint in seen:
            continue
        seen.add(fingerprint)
        if len(content) > wanted:
            content = content[: content.rfind(b"\n", 0, wanted) + 1]
            taken.append(content)
            break
        taken.append(content)
        wanted -= len(content)
    return taken


def _texts(roots: Sequence[str], folders: Sequence[str]) -> Iterator[str]:
    for folder in (Path(root) / folder for root in roots for folder in folders):
        yield from _read_all(sorted(folder.rglob("*")))


def _read_all(paths: Sequence[Path]) -> Iterator[str]:
    """Texts of files, `.gz` unpacked; what is no UTF-8 or very large is left out."""
    for path in paths:
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 4_000_000:
                continue
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        except (OSError, ValueError, EOFError):
            continue
        if "\0" not in text:
            yield text


def _is_chinese(text: str) -> bool:
    return len(_HAN.findall(text)) > _ENOUGH_HAN * len(text)


if __name__ == "__main__":
    sys.exit(main())
