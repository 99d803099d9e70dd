"""A sound data set, and faults to plant in it: each with the kind, file and line that a doctor must name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from internlm_ds.data.binmeta import Writer, rebuild_meta

VOCAB_SIZE = 10_000
TEXT_BIN, CHAT_BIN = "en/a.bin", "cn/chat.bin"
JSON_HEAD = [1, 5071, 464, 921, 461]  # <s>{"text": " in InternLM's vocabulary, `text` apart


def texts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Different samples, none of them with a masked token."""
    rng = np.random.RandomState(seed)
    return [rng.randint(3, VOCAB_SIZE, size=rng.randint(2, 40)).tolist() for _ in range(count)]


def chats(count: int) -> list[list[int]]:
    """Samples of a question that is not learned and an answer that is."""
    return [[1, -11, -12, -13, *(-i for i in sample[:4]), *sample[4:], 5, 2] for sample in texts(count, seed=1)]


def write(path: Path, samples: list[list[int]]) -> None:
    """A bin with its meta and a note of origin."""
    with Writer(path, overwrite=True) as writer:
        for sample in samples:
            writer.write(sample)
        largest = max((abs(i) for sample in samples for i in sample), default=0)
        counts = {
            "samples": len(samples),
            "tokens": writer.num_tokens,
            "bytes": writer.num_bytes,
            "largest_id": largest,
        }
        note = {
            "kind": "text",
            "tokenizer": {"name": "t.model", "sha256": "00", "vocab_size": VOCAB_SIZE},
            "sources": [],
        }
        writer.put_beside(".json", json.dumps({**note, "counts": counts}).encode())


def sound_set(folder: Path) -> Path:
    """`folder` with two types and three bins, nothing wrong with any."""
    write(folder / TEXT_BIN, texts(60))
    write(folder / CHAT_BIN, chats(30))
    write(folder / "code/deep/c.bin", texts(9, seed=2))
    return folder


class Place:
    """One file of a sound set, to be spoilt."""

    def __init__(self, folder: Path, name: str = TEXT_BIN):
        self.folder, self.path = folder, folder / name
        self.meta, self.note = Path(f"{self.path}.meta"), Path(f"{self.path}.json")

    @property
    def lines(self) -> list[bytes]:
        return self.path.read_bytes().splitlines(keepends=True)

    @property
    def table(self) -> np.ndarray:
        return np.load(self.meta)

    def write_lines(self, lines: list[bytes], *, meta: bool = False) -> None:
        """Other content; `meta`: as by a tool that makes a meta, but no note."""
        self.path.write_bytes(b"".join(lines))
        if meta:
            self.note.unlink(missing_ok=True)
            rebuild_meta(self.path)

    def replace_line(self, line: int, text: bytes, *, meta: bool = False) -> None:
        self.write_lines([*self.lines[: line - 1], text, *self.lines[line:]], meta=meta)

    def write_table(self, table: np.ndarray) -> None:
        with open(self.meta, "wb") as file:
            np.save(file, table)


def row(*tokens: int) -> bytes:
    return json.dumps({"tokens": tokens}).encode() + b"\n"


def flipped_byte(place: Place) -> None:
    place.replace_line(7, place.lines[6].replace(b"[", b"(", 1))


def zeros_in_the_middle(place: Place) -> None:
    place.replace_line(5, b"\0" * (len(place.lines[4]) - 1) + b"\n")


def lost_newline(place: Place) -> None:
    place.replace_line(9, place.lines[8].replace(b"\n", b" "))


def torn_tail(place: Place) -> None:
    place.write_lines([*place.lines[:-1], place.lines[-1][:9]])


def whole_but_unended(place: Place) -> None:
    place.write_lines([*place.lines[:-1], place.lines[-1][:-1]])


def text_instead_of_tokens(place: Place) -> None:
    place.replace_line(3, b'{"text": "raw"}\n')


def fractions_as_ids(place: Place) -> None:
    place.replace_line(4, b'{"tokens": [1.5, 2]}\n')


def binary_instead_of_lines(place: Place) -> None:
    place.path.write_bytes(np.arange(3, 9000, dtype=np.int32).tobytes())


def empty_line(place: Place) -> None:
    place.replace_line(12, b"\n" + place.lines[11])


def carriage_returns(place: Place) -> None:
    place.write_lines([line.replace(b"\n", b"\r\n") for line in place.lines], meta=True)


def no_meta(place: Place) -> None:
    place.meta.unlink()


def torn_meta(place: Place) -> None:
    place.meta.write_bytes(place.meta.read_bytes()[:100])


def meta_of_fractions(place: Place) -> None:
    place.write_table(place.table.astype(np.float64))


def grown_bin(place: Place) -> None:
    place.note.unlink()
    place.write_lines([*place.lines, row(3, 4), row(5, 6)])


def shortened_bin(place: Place) -> None:
    place.note.unlink()
    place.write_lines(place.lines[:-4])


def meta_of_another_bin(place: Place) -> None:
    shutil.copy(f"{place.folder / CHAT_BIN}.meta", place.meta)


def wrong_count_of_tokens(place: Place) -> None:
    table = place.table
    table[20, 1] += 1
    place.write_table(table)


def wrong_offset(place: Place) -> None:
    table = place.table
    table[20, 0] += 1
    place.write_table(table)


def wrapped_offsets(place: Place) -> None:
    table = place.table
    table[30:, 0] -= 1 << 32
    place.write_table(table)


def shuffled_meta(place: Place) -> None:
    place.write_table(place.table[::-1])


def narrow_meta(place: Place) -> None:
    place.write_table(place.table.astype(np.uint16))


def id_beyond_vocabulary(place: Place) -> None:
    place.replace_line(17, row(3, 4, VOCAB_SIZE, 5), meta=True)


def masked_id_beyond_vocabulary(place: Place) -> None:
    place.replace_line(18, row(3, 4, -VOCAB_SIZE, 5), meta=True)


def masked_sample(place: Place) -> None:
    place.replace_line(2, row(1, -4, -5, -6), meta=True)


def empty_sample(place: Place) -> None:
    place.replace_line(6, row(), meta=True)


def second_run(place: Place) -> None:
    place.write_lines(place.lines * 2, meta=True)


def interrupted_second_run(place: Place) -> None:
    place.write_lines([*place.lines, *place.lines[:40]], meta=True)


def second_run_of_the_last_part(place: Place) -> None:
    place.write_lines([*place.lines, *place.lines[-25:]], meta=True)


def json_records(place: Place) -> None:
    place.write_lines([row(*JSON_HEAD, *(9 + i, 8, 7, 2)) for i in range(40)], meta=True)


def json_records_of_any_tokenizer(place: Place) -> None:
    place.write_lines([row(11, 12, 13, 14, 20 + i, 8, 7, 2) for i in range(40)], meta=True)


def json_records_by_note(place: Place) -> None:
    note = json.loads(place.note.read_text())
    place.note.write_text(json.dumps({**note, "compat": "reference", "sources": [{"path": "raw.jsonl"}]}))


def note_of_another_bin(place: Place) -> None:
    shutil.copy(f"{place.folder / CHAT_BIN}.json", place.note)


def torn_note(place: Place) -> None:
    place.note.write_text('{"tool"')


def bin_in_no_type(place: Place) -> None:
    for path in (place.path, place.meta, place.note):
        path.rename(place.folder / path.name)


def misspelt_type(place: Place) -> None:
    place.path.parent.rename(place.folder / "eng")


def same_bin_twice(place: Place) -> None:
    for path in (place.path, place.meta, place.note):
        shutil.copy(path, place.folder / "en" / path.name.replace("a.bin", "copy.bin"))


def packed_bin(place: Place) -> None:
    place.path.with_name("d.bin.gz").write_bytes(b"")


def lost_bin(place: Place) -> None:
    shutil.copy(place.meta, place.path.with_name("d.bin.meta"))


def interrupted_run(place: Place) -> None:
    (place.path.parent / ".d.bin.partial").mkdir()


def no_samples(place: Place) -> None:
    write(place.path, [])


def nobody_may_read(place: Place) -> None:
    place.path.unlink()
    os.symlink("nowhere", place.path)


Fault = tuple[Callable[[Place], None], str, str, int | None]

FAULTS: list[Fault] = [
    # the fault, the kind, the file and the line that must be named
    (flipped_byte, "damaged-line", TEXT_BIN, 7),
    (zeros_in_the_middle, "damaged-line", TEXT_BIN, 5),
    (lost_newline, "damaged-line", TEXT_BIN, 9),
    (torn_tail, "torn-tail", TEXT_BIN, 60),
    (whole_but_unended, "torn-tail", TEXT_BIN, 60),
    (text_instead_of_tokens, "damaged-line", TEXT_BIN, 3),
    (fractions_as_ids, "damaged-line", TEXT_BIN, 4),
    (binary_instead_of_lines, "no-bin", TEXT_BIN, 1),
    (empty_line, "damaged-line", TEXT_BIN, 12),
    (carriage_returns, "line-ends", TEXT_BIN, None),
    (no_meta, "meta-missing", TEXT_BIN, None),
    (torn_meta, "meta-unreadable", TEXT_BIN, None),
    (meta_of_fractions, "meta-unreadable", TEXT_BIN, None),
    (grown_bin, "meta-stale", TEXT_BIN, 61),
    (shortened_bin, "meta-stale", TEXT_BIN, None),
    (meta_of_another_bin, "meta-foreign", TEXT_BIN, 2),
    (wrong_count_of_tokens, "meta-length", TEXT_BIN, 21),
    (wrong_offset, "meta-offset", TEXT_BIN, 21),
    (wrapped_offsets, "meta-wrapped", TEXT_BIN, 31),
    (shuffled_meta, "meta-order", TEXT_BIN, 1),
    (narrow_meta, "meta-type", TEXT_BIN, None),
    (id_beyond_vocabulary, "id-range", TEXT_BIN, 17),
    (masked_id_beyond_vocabulary, "id-range", TEXT_BIN, 18),
    (masked_sample, "all-masked", TEXT_BIN, 2),
    (empty_sample, "empty-sample", TEXT_BIN, 6),
    (second_run, "doubled", TEXT_BIN, 61),
    (interrupted_second_run, "doubled", TEXT_BIN, 61),
    (second_run_of_the_last_part, "doubled", TEXT_BIN, 61),
    (json_records, "json-syntax", TEXT_BIN, 1),
    (json_records_of_any_tokenizer, "same-start", TEXT_BIN, 1),
    (json_records_by_note, "json-syntax", TEXT_BIN, None),
    (note_of_another_bin, "note-mismatch", TEXT_BIN, None),
    (torn_note, "note-unreadable", TEXT_BIN, None),
    (bin_in_no_type, "no-type-folder", "a.bin", None),
    (misspelt_type, "unknown-type", "eng/a.bin", None),
    (same_bin_twice, "same-file", "en/copy.bin", None),
    (packed_bin, "ignored-file", "en/d.bin.gz", None),
    (lost_bin, "meta-orphan", "en/d.bin.meta", None),
    (interrupted_run, "unfinished", "en/.d.bin.partial", None),
    (no_samples, "empty-bin", TEXT_BIN, None),
    (nobody_may_read, "unreadable", TEXT_BIN, None),
]

MENDED = [fault for fault in FAULTS if fault[1].startswith(("damaged", "torn", "line-ends", "meta-", "doubled"))]
"""Faults of which `repair` makes a sound copy."""

__all__ = ["FAULTS", "MENDED", "Place", "sound_set", "write"]
