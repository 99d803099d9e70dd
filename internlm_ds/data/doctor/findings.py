"""What can be wrong with token files, as a table: name, how bad it is, what mends it. And one thing found.

The checks are in the files beside this one; how findings are grouped and printed is `report`'s.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from internlm_ds.data.doctor.lines import Lines

ERROR, WARNING = "error", "warning"

MOST_OF_A_KIND = 10_000
"""Findings of one kind in one file that are told apart; the rest is one finding with a number."""

_REPAIR = "`internlm-ds data repair PATH -o OUT` writes a sound copy"
_AGAIN = "tokenize the text again (internlm-ds preprocess … --overwrite)"
_LEAVE_OUT = "`internlm-ds data repair PATH -o OUT --drop {}` leaves them out"


@dataclass(frozen=True)
class Kind:
    """One sort of fault.

    Attributes:
        severity: "error": training would fail, or learn what it should not; "warning": worth a look.
        title: What it is, in a few words.
        remedy: What mends it.
    """

    severity: str
    title: str
    remedy: str


KINDS: dict[str, Kind] = {
    # the file itself
    "unreadable": Kind(ERROR, "a file that cannot be read", "see that it is there and that you may read it"),
    "empty-bin": Kind(
        WARNING, "a bin without samples", "training leaves it out; delete it if it was meant to hold some"
    ),
    "no-bin": Kind(
        ERROR,
        "a file that is no text bin at all",
        "Megatron's, numpy's or Parquet's: `internlm-ds data convert`; raw text: `internlm-ds preprocess text`",
    ),
    "damaged-line": Kind(ERROR, "lines that hold no sample", f"{_REPAIR} without them; to have them back, {_AGAIN}"),
    "torn-tail": Kind(ERROR, "a last line without its end: the writer was interrupted", _REPAIR),
    "line-ends": Kind(
        WARNING,
        "lines that end with a carriage return: a tool took the file for text",
        f"training reads them; {_REPAIR} with plain line ends",
    ),
    # the meta beside it
    "meta-missing": Kind(ERROR, "no meta beside the bin", _REPAIR),
    "meta-unreadable": Kind(ERROR, "a meta that is no table of integers", _REPAIR),
    "meta-type": Kind(WARNING, "a meta of unusual type or shape", f"other tools may not read it; {_REPAIR}"),
    "meta-stale": Kind(ERROR, "a meta of another state of this bin", _REPAIR),
    "meta-foreign": Kind(ERROR, "a meta that belongs to another bin", f"put the right one beside it, or {_REPAIR}"),
    "meta-wrapped": Kind(ERROR, "offsets beyond 2 GiB in an int32 meta, wrapped around", f"{_REPAIR} (int64)"),
    "meta-order": Kind(WARNING, "meta rows in another order than the lines", f"training reads it; {_REPAIR} in order"),
    "meta-offset": Kind(ERROR, "meta rows that point to no line's start", _REPAIR),
    "meta-length": Kind(ERROR, "meta rows with a wrong number of tokens", _REPAIR),
    "meta-orphan": Kind(
        WARNING,
        "a meta without its bin",
        "an interrupted run left it, or the bin was moved: tokenize again, or delete it",
    ),
    # the samples
    "id-range": Kind(
        ERROR,
        "ids that the vocabulary does not have",
        f"set model.vocab_size to that of the tokenizer that was used, or {_AGAIN} with the model's; "
        + _LEAVE_OUT.format("id-range"),
    ),
    "all-masked": Kind(
        ERROR,
        "samples of which nothing is learned: every target is masked",
        f"look at what made them (no answer, or cut before it?); {_LEAVE_OUT.format('all-masked')}",
    ),
    "empty-sample": Kind(WARNING, "samples without tokens", _LEAVE_OUT.format("empty-sample")),
    "short": Kind(ERROR, "samples that are shorter than --min-length", _LEAVE_OUT.format("short --min-length N")),
    "dropped": Kind(WARNING, "samples that data.min_length leaves out", "lower it if they shall be trained on"),
    "all-dropped": Kind(ERROR, "bins of which data.min_length leaves nothing", "lower it, or delete the file"),
    "doubled": Kind(
        ERROR,
        "samples that are there once more: a second run appended to the file",
        "`internlm-ds data repair PATH -o OUT` writes a copy without the repetition",
    ),
    "same-file": Kind(WARNING, "bins that hold the samples of another", "delete one, unless it shall count twice"),
    "json-syntax": Kind(
        ERROR,
        "samples that hold JSON syntax: records were tokenized as they stand, braces and all",
        "tokenize the records' text: `internlm-ds preprocess text … --text-key KEY` without --compat reference",
    ),
    "same-start": Kind(
        WARNING,
        "samples that all begin with the same ids",
        "see what they say (JSON syntax?): `internlm-ds data show PATH --sample 0 --tokenizer MODEL`",
    ),
    # the note beside it
    "note-unreadable": Kind(WARNING, "a note of origin that cannot be read", "delete it, or tokenize the text again"),
    "note-mismatch": Kind(
        ERROR, "a note of origin that tells of another bin", f"{_AGAIN}, or delete the note if the bin is right"
    ),
    "other-tokenizer": Kind(ERROR, "bins made with another tokenizer than the one named", f"{_AGAIN} with that one"),
    "source-changed": Kind(WARNING, "texts that changed since they were tokenized", _AGAIN),
    # folders
    "no-type-folder": Kind(
        ERROR, "bins in no type's folder", "move each into a folder named after its data type, such as en/"
    ),
    "unknown-type": Kind(
        WARNING,
        "folders that are none of InternLM's six types",
        "training takes any name and uses it in metrics; rename the folder if it is a slip",
    ),
    "unfinished": Kind(
        WARNING,
        "the work of a run that was interrupted, or is still writing",
        "go on with the same command and --resume; if it is not wanted, delete the folder",
    ),
    "ignored-file": Kind(WARNING, "files that training does not read", "it reads *.bin: unpack or rename them"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one file.

    Attributes:
        kind: Key of `KINDS`.
        path: The file.
        message: What was found, without the place.
        line: 1-based line of the bin, None where it concerns the whole file.
        offset_bytes: Byte at which that line begins.
        times: How many faults this stands for; more than 1 only for the rest of a long list.
    """

    kind: str
    path: str
    message: str
    line: int | None = None
    offset_bytes: int | None = None
    times: int = 1

    @property
    def severity(self) -> str:
        return KINDS[self.kind].severity

    @property
    def remedy(self) -> str:
        """What mends it, with the file's name in the commands."""
        return KINDS[self.kind].remedy.replace("PATH", shlex.quote(self.path))

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data, with its severity and remedy."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "file": self.path,
            "line": self.line,
            "offset_bytes": self.offset_bytes,
            "times": self.times,
            "message": self.message,
            "remedy": self.remedy,
        }


def at_rows(
    kind: str, path: str, lines: Lines, rows: npt.NDArray[Any], message: Callable[[int], str]
) -> Iterator[Finding]:
    """One finding for each of these samples, and one for the rest of a very long list."""
    for row in rows[:MOST_OF_A_KIND].tolist():
        yield Finding(kind, path, message(row), lines.line(row), int(lines.offsets[row]))
    yield from the_rest(kind, path, len(rows) - MOST_OF_A_KIND)


def the_rest(kind: str, path: str, times: int) -> Iterator[Finding]:
    """What stands for faults that are not listed one by one."""
    if times > 0:
        yield Finding(kind, path, f"{times} more", times=times)
