"""The engine of all fine-tuning data: records in, `train/TYPE/dataset.bin` and `valid/TYPE/dataset.bin` out.

A `Recipe` turns one record into parts; reading, the split, encoding, the limit on length, provenance and the two
outputs are the same for all recipes and live here. Bytes are `data.binmeta`'s, reading `documents`'.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import Writer, check_output
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.documents import records
from internlm_ds.preprocess.files import SourceFile, expand_inputs, split_name
from internlm_ds.preprocess.progress import Progress
from internlm_ds.preprocess.samples import Frame, Limit, Tally, finished
from internlm_ds.preprocess.segments import Control, Part, Segment, TextTokenizer, encode_parts, signed, spell

SHARES = ("train", "valid")
BIN_NAME = "dataset.bin"
# InternLM's chat pieces under all their names: where a model has one, no text may become it
CHAT_PIECES = ("<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]")
_BATCH_RECORDS = 512


class Place(NamedTuple):
    """Where a record stands: file, line on which it begins, number in the file (both from 1)."""

    path: str
    line: int
    record: int

    def error(self, message: str) -> DataFormatError:
        return DataFormatError(f"record {self.record}: {message}", path=self.path, line=self.line)


@dataclass(frozen=True)
class Recipe:
    """What one kind of data set is made of.

    Attributes:
        kind: Its name in the provenance file.
        parts: The parts of a record, None to leave it out (counted as skipped); raises `Place.error`.
        frame: What stands around each sample.
        framing: Ids that end or begin a turn; control pieces that a part names are looked up in the model.
        guarded: Literal control pieces in a text are text; off only where the reference's bytes are wanted.
        settings: What the provenance file shall say about it.
    """

    kind: str
    parts: Callable[[Any, Place], Sequence[Part] | None]
    frame: Frame
    framing: tuple[int, ...] = ()
    guarded: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Which share of the samples is for validation; `replace` draws with replacement, as the reference does."""

    ratio: float = 0.1
    seed: int = 0
    replace: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise DataFormatError(f"--split-ratio {self.ratio}: a share between 0 and 1, such as 0.1")


@dataclass(frozen=True)
class ShareSummary:
    """One output: where it lies, and what went into it and what did not."""

    path: str
    tally: Tally

    @property
    def samples(self) -> int:
        return self.tally.samples

    @property
    def tokens(self) -> int:
        return self.tally.tokens

    @property
    def truncated(self) -> int:
        return self.tally.truncated

    @property
    def truncated_tokens(self) -> int:
        return self.tally.truncated_tokens


@dataclass(frozen=True)
class Outcome:
    """What a run wrote; `skipped`: records that the recipe left out."""

    train: ShareSummary
    valid: ShareSummary
    skipped: int


def draw_validation(num_samples: int, *, split: Split) -> npt.NDArray[np.bool_]:
    """Which records are for validation: bool `(num_samples,)`, `int(num_samples * ratio)` of them (fewer with
    `replace`)."""
    count = int(num_samples * split.ratio)
    chosen = np.zeros(num_samples, dtype=np.bool_)
    # RandomState: its streams are promised never to change, those of the newer generators are not
    if count:
        chosen[np.random.RandomState(split.seed).choice(num_samples, count, replace=split.replace)] = True
    return chosen


def tokenize_records(
    recipe: Recipe,
    dataset: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: TextTokenizer,
    split: Split = Split(),
    limit: Limit = Limit(),
    data_type: str = "en",
    overwrite: bool = False,
    empty_meta: str | None = None,
    progress_to: IO[str] | None = None,
) -> Outcome:
    """Tokenize a data set into `output/train/TYPE` and `output/valid/TYPE`.

    The data set is read twice: first to check every record and to draw the validation share, then to write. Samples
    that one record is split into stay together.

    Args:
        dataset: A file, or a glob that matches several; one JSON list, or a record a line where it ends in `.jsonl`.
        empty_meta: See `data.binmeta.Writer`.

    Raises:
        DataFormatError: The data set or the output is unusable; then nothing has changed on disk.
        TokenizerError: The model lacks a piece.
    """
    check_type(data_type)
    paths = [Path(output) / share / data_type / BIN_NAME for share in SHARES]
    for path in paths:
        check_output(path, append=False, overwrite=overwrite, can_append=False)
    sources = [SourceFile(path) for path in expand_inputs([dataset])]
    kept, skipped, named = _survey(recipe, sources)
    controls = _controls(tokenizer, named)
    chosen = draw_validation(kept, split=split)
    with ExitStack() as stack:
        shares = [_Share(path, stack, overwrite=overwrite, empty_meta=empty_meta) for path in paths]
        progress = Progress(sum(source.num_bytes for source in sources), stream=progress_to)
        for index, body in enumerate(_bodies(recipe, sources, tokenizer, controls)):
            shares[int(chosen[index])].add(body, frame=recipe.frame, limit=limit)
            done = sum(source.bytes_read for source in sources)
            progress.update(done, tokens=sum(share.tally.tokens for share in shares))
        progress.finish()
        entries = [{"path": s.path, "bytes": s.bytes_read, "sha256": s.sha256} for s in sources]
        for share, name in zip(shares, SHARES):
            settings = _settings(recipe, name, split=split, limit=limit)
            share.record(tokenizer, kind=recipe.kind, settings=settings, sources=entries, skipped=skipped)
    summaries = [ShareSummary(str(share.writer.path), share.tally) for share in shares]
    return Outcome(summaries[0], summaries[1], skipped)


def check_type(data_type: str) -> None:
    """A data type is the name of one folder."""
    if not data_type or data_type in (".", "..") or "/" in data_type or os.sep in data_type:
        raise DataFormatError(f"--type {data_type!r}: the name of a folder, such as en, cn or code")


def _settings(recipe: Recipe, share: str, *, split: Split, limit: Limit) -> dict[str, Any]:
    frame = recipe.frame
    first = {"bos": bool(frame.bos), "eos": bool(frame.eos), "text_key": None, "compat": None, "share": share}
    drawn = {"split_ratio": split.ratio, "seed": split.seed}
    return {**first, **recipe.settings, **drawn, "max_tokens": limit.max_tokens, "too_long": limit.too_long}


class _Share:
    """One of the two outputs while it is written."""

    def __init__(self, path: Path, stack: ExitStack, *, overwrite: bool, empty_meta: str | None):
        self.writer = stack.enter_context(Writer(path, overwrite=overwrite, empty_meta=empty_meta))
        self.tally = Tally()
        self.largest_id = 0

    def add(self, body: Sequence[Segment], *, frame: Frame, limit: Limit) -> None:
        for sample in finished(body, frame=frame, limit=limit, tally=self.tally):
            ids = signed(sample)
            self.writer.write(ids)
            self.largest_id = max(self.largest_id, max(ids), -min(ids))

    def record(
        self,
        tokenizer: TextTokenizer,
        *,
        kind: str,
        settings: Mapping[str, Any],
        sources: Sequence[Mapping[str, Any]],
        skipped: int,
    ) -> None:
        """Put the provenance file beside the bin."""
        counts = {**self.tally.counts(), "skipped": skipped, "bytes": self.writer.num_bytes}
        counts["largest_id"] = self.largest_id
        about = provenance.describe(cast(Any, tokenizer), kind=kind, settings=settings, sources=sources, counts=counts)
        self.writer.put_beside(provenance.SUFFIX, provenance.encode(about))


def _records(sources: Sequence[SourceFile]) -> Iterator[tuple[Any, Place]]:
    """Records with their places; a name that does not end in .jsonl is one JSON list, as the reference reads it."""
    for source in sources:
        kind, _ = split_name(source.path)
        with source.open() as stream:
            found = records(stream, kind="jsonl" if kind == "jsonl" else "json", path=source.path)
            for number, (line, value) in enumerate(found, start=1):
                yield value, Place(source.path, line, number)


def _survey(recipe: Recipe, sources: Sequence[SourceFile]) -> tuple[int, int, set[str]]:
    """Records kept, records skipped, names of control pieces; every record is looked at before anything is written."""
    kept = skipped = 0
    named: set[str] = set()
    for value, place in _records(sources):
        parts = recipe.parts(value, place)
        if parts is None:
            skipped += 1
            continue
        kept += 1
        named.update(part.content.name for part in parts if isinstance(part.content, Control))
    return kept, skipped, named


def _controls(tokenizer: TextTokenizer, named: set[str]) -> dict[str, int]:
    found = {}
    for name in sorted(named):
        number = tokenizer.piece_id(name)
        if number is None:
            raise TokenizerError(
                f"{tokenizer.name} has no piece {name!r}, which a sample asks for; use one that it has"
            )
        found[name] = number
    return found


def guards(recipe: Recipe, tokenizer: TextTokenizer, controls: Mapping[str, int]) -> dict[int, list[int]]:
    """Ids that no text may become, each with its name in ordinary pieces.

    They are the ids that frame this recipe's turns and InternLM's chat pieces, as far as the model turns a text that
    spells them out into them.
    """
    if not recipe.guarded:
        return {}
    frame = recipe.frame.bos + recipe.frame.eos
    known = [tokenizer.piece_id(name) for name in CHAT_PIECES]
    ids = {number for number in (*known, *controls.values(), *recipe.framing, *frame) if number is not None}
    names = {number: tokenizer.piece(number) for number in sorted(ids) if number < tokenizer.vocab_size}
    encoded = tokenizer.encode(list(names.values()))
    return {number: spell(names[number], tokenizer) for number, found in zip(names, encoded) if number in found}


def _bodies(
    recipe: Recipe, sources: Sequence[SourceFile], tokenizer: TextTokenizer, controls: Mapping[str, int]
) -> Iterator[list[Segment]]:
    spelled = guards(recipe, tokenizer, controls)
    found = (parts for value, place in _records(sources) if (parts := recipe.parts(value, place)) is not None)
    while batch := [parts for _, parts in zip(range(_BATCH_RECORDS), found)]:
        yield from encode_parts(batch, tokenizer=tokenizer, controls=controls, spelled=spelled)
