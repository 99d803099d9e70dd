"""What can be wrong with token files, as a table: name, how bad it is, what mends it. And one thing found.

The checks are in the files beside this one; how findings are grouped and printed is `report`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ERROR, WARNING = "error", "warning"

REPAIR = "`internlm-ds data repair PATH -o OUT` writes a sound copy"
AGAIN = "tokenize the text again (internlm-ds preprocess … --overwrite)"


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
    "unreadable": Kind(ERROR, "a file that cannot be read", "check that it is there and its permissions"),
    "damaged-line": Kind(ERROR, "lines that hold no sample", f"{REPAIR} without them, or {AGAIN}"),
    "torn-tail": Kind(ERROR, "a last line without its end: the writer was interrupted", f"{REPAIR} without it"),
    "meta-missing": Kind(ERROR, "no meta beside the bin", REPAIR),
    "meta-unreadable": Kind(ERROR, "a meta that is no table of integers", REPAIR),
    "meta-stale": Kind(ERROR, "a meta of another state of this bin", REPAIR),
    "meta-foreign": Kind(ERROR, "a meta that belongs to another bin", REPAIR),
    "meta-offset": Kind(ERROR, "meta rows that point to no line's start", REPAIR),
    "meta-length": Kind(ERROR, "meta rows with a wrong number of tokens", REPAIR),
    "id-range": Kind(
        ERROR,
        "ids that the vocabulary does not have",
        f"{AGAIN} with the model's tokenizer, or set model.vocab_size to that of the tokenizer that was used",
    ),
    "all-masked": Kind(
        ERROR,
        "samples of which nothing is learned: every target is masked",
        "look at what made them (a turn without answer, a cut at the maximum length?); leave them out: data repair"
        " --drop all-masked",
    ),
    "no-type-folder": Kind(
        ERROR,
        "bins directly in the data set's folder",
        "move each into a folder named after its data type, such as en/",
    ),
    "unknown-type": Kind(
        WARNING,
        "folders that are none of InternLM's six types",
        "the folder's name becomes the name of the type in metrics; rename the folder if it is a slip",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one file.

    Attributes:
        kind: Key of `KINDS`.
        path: The file.
        message: What was found, without the place.
        line: 1-based line of the bin, None where it concerns the whole file.
        offset_bytes: Byte at which that line begins (or the fault itself, where the message says so).
    """

    kind: str
    path: str
    message: str
    line: int | None = None
    offset_bytes: int | None = None

    @property
    def severity(self) -> str:
        return KINDS[self.kind].severity

    @property
    def remedy(self) -> str:
        return KINDS[self.kind].remedy

    def as_json(self) -> dict[str, Any]:
        """The finding as plain data, with its severity and remedy."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "file": self.path,
            "line": self.line,
            "offset_bytes": self.offset_bytes,
            "message": self.message,
            "remedy": self.remedy,
        }
