"""Instruction data (Alpaca's fields) to `train/en/dataset.bin` and `valid/en/dataset.bin`.

A sample's prompt is on disk with negative ids (input, no loss), its answer with positive ones. Splitting, the layout of
a sample and the two outputs live here; bytes in `data.binmeta`, reading in `documents`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binmeta import Writer, check_output
from internlm_ds.errors import DataFormatError, TokenizerError
from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.documents import records, string_field
from internlm_ds.preprocess.files import SourceFile, expand_inputs, split_name
from internlm_ds.preprocess.progress import Progress
from internlm_ds.preprocess.tokenizers import Tokenizer

MAX_TOKENS = 2048
USER_MARK, BOT_MARK = "<|User|>:", "<|Bot|>:"
_REFERENCE_IDS = {"eoh": 103167, "eoa": 103166, "newline": 13}
_NEWLINE_PIECE = "<0x0A>"
_BATCH_RECORDS = 512


class ChatIds(NamedTuple):
    """Ids that frame a conversation: `<eoh>` ends the human's turn, `<eoa>` the assistant's, each before a newline."""

    bos: int
    eos: int
    eoh: int
    eoa: int
    newline: int


class Turn(NamedTuple):
    """Texts of one record, and the line on which it begins."""

    user: str
    answer: str
    line: int


@dataclass(frozen=True)
class ShareSummary:
    """One output: samples, tokens, samples that were cut at `MAX_TOKENS` and the tokens they lost."""

    path: str
    samples: int
    tokens: int
    truncated: int
    truncated_tokens: int


def encode_turn(
    user: Sequence[int], bot_mark: Sequence[int], answer: Sequence[int], *, ids: ChatIds, max_tokens: int = MAX_TOKENS
) -> tuple[list[int], int]:
    """Ids of a sample, signed as on disk, and how many of them did not fit.

    Source: InternEvo `tools/alpaca_tokenizer.py`; eos always ends the sample, also a cut one.

    >>> encode_turn([5], [6], [7, 8], ids=ChatIds(bos=1, eos=2, eoh=30, eoa=31, newline=13))
    ([1, -5, -30, -13, -6, 7, 8, 31, 13, 2], 0)
    """
    prompt = [-i for i in (*user, ids.eoh, ids.newline, *bot_mark)]
    whole = [ids.bos, *prompt, *answer, ids.eoa, ids.newline]
    lost = max(0, len(whole) - (max_tokens - 1))
    return [*whole[: max_tokens - 1], ids.eos], lost


def draw_validation(num_samples: int, *, split_ratio: float, seed: int, compat: bool) -> npt.NDArray[np.bool_]:
    """Which samples are for validation: bool `(num_samples,)`, `int(num_samples * split_ratio)` of them.

    With `compat` they are drawn with replacement, as the reference does, so fewer may come out.
    """
    count = int(num_samples * split_ratio)
    chosen = np.zeros(num_samples, dtype=np.bool_)
    # RandomState: its streams are promised never to change, those of the newer generators are not
    if count:
        chosen[np.random.RandomState(seed).choice(num_samples, count, replace=compat)] = True
    return chosen


def chat_ids(tokenizer: Tokenizer, *, eoh: str | None, eoa: str | None, compat: bool) -> ChatIds:
    """The framing ids: looked up in the model, or with `compat` the reference's numbers; an option wins over both.

    Raises:
        TokenizerError: The model lacks one.
    """

    def find(given: str | None, piece: str, option: str) -> int:
        if compat and given is None:
            return _REFERENCE_IDS[option]
        return tokenizer.piece_or_id(piece if given is None else given, option=f"--{option}")

    newline = _REFERENCE_IDS["newline"] if compat else tokenizer.piece_id(_NEWLINE_PIECE)
    if newline is None:
        raise TokenizerError(f"{tokenizer.name} has no piece {_NEWLINE_PIECE} (byte fallback), which ends a turn")
    return ChatIds(
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        eoh=find(eoh, "<eoh>", "eoh"),
        eoa=find(eoa, "<eoa>", "eoa"),
        newline=newline,
    )


def tokenize_alpaca(
    dataset: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    split_ratio: float = 0.1,
    seed: int = 0,
    eoh: str | None = None,
    eoa: str | None = None,
    compat: bool = False,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress_to: IO[str] | None = None,
) -> tuple[ShareSummary, ShareSummary]:
    """Tokenize a data set into `output/train/en` and `output/valid/en`; returns what went into each.

    Raises:
        DataFormatError: The data set or the output is unusable; then nothing has changed on disk.
        TokenizerError: The model lacks a piece.
    """
    if not 0.0 <= split_ratio <= 1.0:
        raise DataFormatError(f"--split-ratio {split_ratio}: a share between 0 and 1, such as 0.1")
    paths = [Path(output) / share / "en" / "dataset.bin" for share in ("train", "valid")]
    for path in paths:
        check_output(path, append=False, overwrite=overwrite, can_append=False)
    ids = chat_ids(tokenizer, eoh=eoh, eoa=eoa, compat=compat)
    for name, number in (("eoh", ids.eoh), ("eoa", ids.eoa)):
        if number >= tokenizer.vocab_size:
            warn(f"the reference's id {number} of <{name}> is outside {tokenizer.name} ({tokenizer.vocab_size} pieces)")
    source = _source(dataset)
    num_samples = sum(1 for _ in _turns(source))
    chosen = draw_validation(num_samples, split_ratio=split_ratio, seed=seed, compat=compat)
    with ExitStack() as stack:
        shares = [_Share(path, stack, overwrite=overwrite, compat=compat) for path in paths]
        progress = Progress(source.num_bytes, stream=progress_to)
        for index, (sample, lost) in enumerate(_samples(source, tokenizer, ids)):
            shares[int(chosen[index])].add(sample, lost)
            progress.update(source.bytes_read, tokens=sum(share.tokens for share in shares))
        progress.finish()
        settings = {"split_ratio": split_ratio, "seed": seed, "pieces": ids._asdict()}
        for share, name in zip(shares, ("train", "valid")):
            share.record(name, tokenizer, source, settings=settings, compat=compat)
    return shares[0].summary(), shares[1].summary()


class _Share:
    """One of the two outputs while it is written."""

    def __init__(self, path: Path, stack: ExitStack, *, overwrite: bool, compat: bool):
        # the reference saves an empty list as a float64 array
        empty_meta = "float64" if compat else None
        self.writer = stack.enter_context(Writer(path, overwrite=overwrite, empty_meta=empty_meta))
        self.tokens = self.truncated = self.truncated_tokens = self.largest_id = 0

    def add(self, sample: list[int], lost: int) -> None:
        self.writer.write(sample)
        self.tokens += len(sample)
        self.truncated += lost > 0
        self.truncated_tokens += lost
        self.largest_id = max(self.largest_id, max(sample), -min(sample))

    def summary(self) -> ShareSummary:
        path, samples = str(self.writer.path), self.writer.num_samples
        return ShareSummary(path, samples, self.tokens, self.truncated, self.truncated_tokens)

    def record(
        self, share: str, tokenizer: Tokenizer, source: SourceFile, *, settings: dict[str, Any], compat: bool
    ) -> None:
        """Put the provenance file beside the bin."""
        counts = {
            "samples": self.writer.num_samples,
            "tokens": self.tokens,
            "truncated": self.truncated,
            "truncated_tokens": self.truncated_tokens,
            "bytes": self.writer.num_bytes,
            "largest_id": self.largest_id,
        }
        fixed = {"bos": True, "eos": True, "text_key": None, "compat": "reference" if compat else None, "share": share}
        entry = {"path": source.path, "bytes": source.bytes_read, "sha256": source.sha256}
        record = provenance.describe(
            tokenizer, kind="alpaca", settings={**fixed, **settings}, sources=[entry], counts=counts
        )
        self.writer.put_beside(provenance.SUFFIX, provenance.encode(record))


def _source(dataset: str) -> SourceFile:
    found = expand_inputs([dataset])
    if len(found) != 1:
        raise DataFormatError(f"one data set is needed, this names {len(found)} files", path=dataset)
    return SourceFile(found[0])


def _turns(source: SourceFile) -> Iterator[Turn]:
    """Records of the data set; a name that does not end in .jsonl is read as one JSON list, as the reference does."""
    kind, _ = split_name(source.path)
    with source.open() as stream:
        for line, value in records(stream, kind="jsonl" if kind == "jsonl" else "json", path=source.path):
            yield _turn(value, path=source.path, line=line)


def _turn(value: Any, *, path: str, line: int) -> Turn:
    """Raises DataFormatError where a record is none of Alpaca's; `input` may be missing."""
    missing = ["instruction", "output"] if not isinstance(value, dict) else []
    missing = missing or [key for key in ("instruction", "output") if key not in value]
    if missing:
        lacks = " and ".join(f'"{key}"' for key in missing)
        message = f'this record lacks {lacks}; a record reads {{"instruction": …, "input": …, "output": …}}'
        raise DataFormatError(message, path=path, line=line)
    instruction, answer = (string_field(value, key, path=path, line=line) for key in ("instruction", "output"))
    extra = string_field(value, "input", path=path, line=line) if "input" in value else ""
    return Turn(USER_MARK + instruction + (f"\n{extra}" if extra else ""), answer, line)


def _samples(source: SourceFile, tokenizer: Tokenizer, ids: ChatIds) -> Iterator[tuple[list[int], int]]:
    (bot_mark,) = tokenizer.encode([BOT_MARK])
    turns = _turns(source)
    while batch := [turn for _, turn in zip(range(_BATCH_RECORDS), turns)]:
        users = tokenizer.encode([turn.user for turn in batch])
        answers = tokenizer.encode([turn.answer for turn in batch])
        for user, answer in zip(users, answers):
            yield encode_turn(user, bot_mark, answer, ids=ids)
