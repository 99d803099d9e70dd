"""The examination of a bin: every check in its order, and of several bins against one another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from internlm_ds.data.doctor import contents, notes, pairing
from internlm_ds.data.doctor.findings import ERROR, Finding, the_rest
from internlm_ds.data.doctor.lines import Lines

FEWEST_TO_TELL = 3
"""So many lines without a sample, and none with one, are a file of another kind."""


@dataclass(frozen=True)
class Expected:
    """What a bin is held against; with the defaults nothing from outside.

    Attributes:
        vocab_size: Ids must be below it. None: what the note beside the bin says, if there is one.
        vocab_origin: Where that number comes from, for messages.
        min_length: Fewest tokens of a sample.
        min_length_wanted: All samples shall have them; else training leaves the shorter ones out.
        tokenizer: The bin should have been made with it.
        decode: Ids to text, by that tokenizer.
        hash_sources: Compare the texts that the note names with their hashes.
    """

    vocab_size: int | None = None
    vocab_origin: str = ""
    min_length: int = 0
    min_length_wanted: bool = True
    tokenizer: notes.TokenizerFacts | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    hash_sources: bool = False


@dataclass(frozen=True)
class Examined:
    """What a bin holds and what is wrong with it.

    Attributes:
        identity: The same for bins with the same samples in the same order; empty for a bin with hardly any.
    """

    path: str
    samples: int = 0
    tokens: int = 0
    num_bytes: int = 0
    findings: tuple[Finding, ...] = field(default=(), repr=False)
    identity: bytes = b""

    @property
    def is_sound(self) -> bool:
        return not any(finding.severity == ERROR for finding in self.findings)


def examine(path: str, lines: Lines | OSError, expected: Expected) -> Examined:
    """Everything that can be said of one bin and what lies beside it.

    Args:
        lines: What `scan.scan_bins` found.
    """
    if isinstance(lines, OSError):
        return Examined(path, findings=(Finding("unreadable", path, lines.strerror or str(lines)),))
    identity = hashlib.sha256(lines.digests.tobytes()).digest() if len(lines) >= contents.FEWEST_ALIKE else b""
    found = tuple(_findings(path, lines, expected))
    return Examined(path, len(lines), lines.num_tokens, lines.size, found, identity)


def compare_bins(examined: Sequence[Examined]) -> Iterator[Finding]:
    """Bins that hold what an earlier one holds."""
    first: dict[bytes, str] = {}
    for one in examined:
        if one.identity and first.setdefault(one.identity, one.path) != one.path:
            yield Finding("same-file", one.path, f"its {one.samples} samples are those of {first[one.identity]}")


def _findings(path: str, lines: Lines, expected: Expected) -> Iterator[Finding]:
    if lines.num_bad >= FEWEST_TO_TELL and not len(lines):
        message = f"none of its {lines.num_bad} lines holds a sample; the first: {lines.bad[0].message}"
        yield Finding("no-bin", path, message, 1, 0)
        return
    yield from _bad_lines(path, lines)
    yield from pairing.check_meta(path, lines)
    note, _ = notes.read_note(path)
    vocab_size, origin = expected.vocab_size, expected.vocab_origin
    if vocab_size is None:
        vocab_size, origin = _noted_vocabulary(note), f"the tokenizer in {path}.json"
    if vocab_size is not None:
        yield from contents.check_ids(path, lines, vocab_size, origin=origin)
    yield from contents.check_learning(path, lines)
    if expected.min_length > 0:
        yield from contents.check_lengths(path, lines, expected.min_length, wanted=expected.min_length_wanted)
    yield from contents.check_repeats(path, lines)
    records = notes.raw_records(note)
    if records:
        yield Finding("json-syntax", path, f"{path}.json: {records[0]} was tokenized as the reference does")
    else:
        yield from contents.check_syntax(path, lines, expected.decode)
    yield from notes.check_note(path, lines, tokenizer=expected.tokenizer, hash_sources=expected.hash_sources)


def _bad_lines(path: str, lines: Lines) -> Iterator[Finding]:
    torn_line = 0 if lines.has_end else lines.num_lines
    for bad in lines.bad:
        kind = "torn-tail" if bad.line == torn_line else "damaged-line"
        yield Finding(kind, path, bad.message, bad.line, bad.offset_bytes)
    yield from the_rest("damaged-line", path, lines.num_bad - len(lines.bad))
    if torn_line and len(lines) and lines.line(len(lines) - 1) == torn_line:
        message = "the last sample is whole but has no newline behind it: the next append would spoil it"
        yield Finding("torn-tail", path, message, torn_line, int(lines.offsets[-1]))
    if lines.carriage_returns:
        yield Finding("line-ends", path, f"{lines.carriage_returns} of {lines.num_lines} lines")
    if not lines.num_lines:
        yield Finding("empty-bin", path, "no lines")


def _noted_vocabulary(note: Mapping[str, object]) -> int | None:
    tokenizer = note.get("tokenizer")
    size = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
    return size if isinstance(size, int) else None
