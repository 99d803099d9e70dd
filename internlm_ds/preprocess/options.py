"""What may be asked of a run over texts: how texts become samples, how the work is done."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.blocks import BLOCK_BYTES
from internlm_ds.preprocess.engine.select import EngineName
from internlm_ds.preprocess.journal import INTERVAL_S


@dataclass(frozen=True)
class TextOptions:
    """How texts become samples.

    Attributes:
        bos, eos: Put the model's piece before, behind each sample.
        text_key: Field of JSON records that holds the text; None: `text`, then `content`.
        compat: Write what InternEvo's tool of March 2024 writes (see `for_reference`).
    """

    bos: bool = False
    eos: bool = False
    text_key: str | None = None
    compat: bool = False

    @classmethod
    def choose(cls, *, bos: bool | None, eos: bool | None, text_key: str | None, compat: bool) -> TextOptions:
        """What was not said (None) is off, or on with `compat`, as the reference has it."""
        return cls(compat if bos is None else bos, compat if eos is None else eos, text_key, compat)

    def settings(self) -> dict[str, Any]:
        """As the provenance file names them."""
        compat = "reference" if self.compat else None
        return {"bos": self.bos, "eos": self.eos, "text_key": self.text_key, "compat": compat}


@dataclass(frozen=True)
class Work:
    """How a run is carried out.

    Attributes:
        workers: Threads that tokenize; None: one for each CPU, 16 at most. The output does not depend on it.
        shard_bytes: Begin another bin when one has reached this size.
        resume: Go on where a killed run stopped.
        verify: Hold every row against sentencepiece.
        engine: "auto", or the name of one (see `engine.select`).
        block_bytes: Text that one thread takes at a time.
        journal_s: Seconds between two notes of how far the run has come.
    """

    workers: int | None = None
    shard_bytes: int | None = None
    resume: bool = False
    verify: bool = False
    engine: EngineName = "auto"
    block_bytes: int = BLOCK_BYTES
    journal_s: float = INTERVAL_S


def check_wishes(
    output: str | os.PathLike[str], work: Work, options: TextOptions, *, append: bool, overwrite: bool
) -> None:
    """What excludes each other, whatever is on disk."""
    wrong = None
    if work.workers is not None and work.workers < 1:
        wrong = f"--workers {work.workers}: at least 1"
    elif work.shard_bytes is not None and work.shard_bytes < 1:
        wrong = f"--shard-size {work.shard_bytes}: at least 1 byte"
    elif work.shard_bytes is not None and options.compat:
        wrong = "--shard-size and --compat reference exclude each other: the reference writes one bin"
    elif append and work.shard_bytes is not None:
        wrong = "--append and --shard-size exclude each other: write the new samples to an output of their own"
    elif append and work.resume:
        wrong = "--append and --resume exclude each other: a finished append would be done again"
    elif append and overwrite:
        wrong = "--append and --overwrite exclude each other"
    if wrong:
        raise DataFormatError(wrong, path=os.fspath(output))
