"""The note of origin beside a bin (`X.bin.json`): does it tell of this bin, this tokenizer, these texts?

What the note holds is `preprocess.provenance`'s, which stands above this room: here its few fields are read as they
lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from internlm_ds.data.doctor.findings import Finding
from internlm_ds.data.doctor.lines import Lines

_FORMATS_WITH_RECORDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst")


@dataclass(frozen=True)
class TokenizerFacts:
    """What a tokenizer that the user names is known by."""

    name: str
    sha256: str
    vocab_size: int


def read_note(path: str) -> tuple[Mapping[str, Any], str]:
    """The note beside a bin and what is wrong with it; an empty note where there is none, or none that can be read."""
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            note = json.load(file)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, str(error)
    if not isinstance(note, dict) or not isinstance(note.get("counts"), dict):
        return {}, "it holds no counts"
    return note, ""


def check_note(
    path: str, lines: Lines, *, tokenizer: TokenizerFacts | None = None, hash_sources: bool = False
) -> Iterator[Finding]:
    """What in the note does not fit.

    Args:
        tokenizer: The bin should have been made with this one.
        hash_sources: Read the texts that it names, where they still are, and compare their hashes.
    """
    note, wrong = read_note(path)
    name = os.path.basename(path) + ".json"
    if wrong:
        yield Finding("note-unreadable", path, f"{name}: {wrong}")
    if not note:
        return
    differ = [
        f"{noted} {key}, the bin {found}" for key, noted, found in _counts(note["counts"], lines) if noted != found
    ]
    if differ:
        yield Finding("note-mismatch", path, f"{name} says {'; '.join(differ)}")
    made_with = note.get("tokenizer")
    if tokenizer and isinstance(made_with, dict) and made_with.get("sha256") not in (None, tokenizer.sha256):
        yield Finding("other-tokenizer", path, f"{name} names {made_with.get('name')}, not this {tokenizer.name}")
    if hash_sources:
        yield from _changed_sources(path, note)


def raw_records(note: Mapping[str, Any]) -> list[str]:
    """Sources whose JSON records were tokenized as they stand, as the reference does."""
    if (note.get("kind"), note.get("compat")) != ("text", "reference"):
        return []
    return [source for source in _source_paths(note) if source.endswith(_FORMATS_WITH_RECORDS)]


def _counts(counts: Mapping[str, Any], lines: Lines) -> Iterator[tuple[str, int, int]]:
    largest = max(0, int(lines.largest.max())) if len(lines) else 0
    found = {"samples": len(lines), "tokens": lines.num_tokens, "bytes": lines.size, "largest_id": largest}
    for key, value in found.items():
        if isinstance(counts.get(key), int):
            yield key.replace("largest_id", "as its largest id"), counts[key], value


def _source_paths(note: Mapping[str, Any]) -> list[str]:
    sources = note.get("sources")
    return [
        source["path"]
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, dict) and isinstance(source.get("path"), str)
    ]


def _changed_sources(path: str, note: Mapping[str, Any]) -> Iterator[Finding]:
    for source in note.get("sources", []):
        known = source.get("sha256") if isinstance(source, dict) else None
        text = source.get("path") if isinstance(source, dict) else None
        if isinstance(known, str) and isinstance(text, str) and os.path.isfile(text):
            with open(text, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != known:
                yield Finding("source-changed", path, f"{text} is not what was tokenized")
