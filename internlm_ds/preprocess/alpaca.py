"""Instruction data with Alpaca's fields, as the tutorial has it: one question, one answer.

What a record's fields become is here, the ids that frame a turn, and the reference's way; the rest is `sft`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.documents import string_field
from internlm_ds.preprocess.samples import Frame, Limit
from internlm_ds.preprocess.segments import Part, TextTokenizer
from internlm_ds.preprocess.sft import Outcome, Place, Recipe, Split, tokenize_records

MAX_TOKENS = 2048
USER_MARK, BOT_MARK = "<|User|>:", "<|Bot|>:"
EOH, EOA, NEWLINE = "<eoh>", "<eoa>", "<0x0A>"
_REFERENCE_IDS = {EOH: 103167, EOA: 103166}
_REFERENCE_NEWLINE = 13


class ChatIds(NamedTuple):
    """Ids that frame a conversation: `<eoh>` ends the human's turn, `<eoa>` the assistant's, each before a newline."""

    bos: int
    eos: int
    eoh: int
    eoa: int
    newline: int


def chat_ids(tokenizer: TextTokenizer, *, eoh: str | None, eoa: str | None, compat: bool = False) -> ChatIds:
    """The framing ids: looked up in the model, or with `compat` the reference's numbers; an option wins over both.

    Raises:
        TokenizerError: The model lacks one.
    """

    def find(given: str | None, piece: str, option: str) -> int:
        if compat and given is None:
            return _REFERENCE_IDS[piece]
        return tokenizer.piece_or_id(piece if given is None else given, option=option)

    newline = _REFERENCE_NEWLINE if compat else _newline(tokenizer)
    return ChatIds(
        bos=tokenizer.bos_id,
        eos=tokenizer.eos_id,
        eoh=find(eoh, EOH, "--eoh"),
        eoa=find(eoa, EOA, "--eoa"),
        newline=newline,
    )


def _newline(tokenizer: TextTokenizer) -> int:
    """The byte piece that ends a turn, or the one piece that a newline is."""
    found = tokenizer.piece_id(NEWLINE)
    if found is not None:
        return found
    (ids,) = tokenizer.encode(["\n"])
    if len(ids) != 1:
        message = f"{tokenizer.name} has neither a piece {NEWLINE} (byte fallback) nor one piece for a newline"
        raise TokenizerError(f"{message}, which ends a turn")
    return ids[0]


def alpaca_recipe(ids: ChatIds, *, compat: bool = False) -> Recipe:
    """The tutorial's sample. With `compat`, literal `<eoh>` and `<eoa>` in a text become the model's pieces.

    Source: InternEvo `tools/alpaca_tokenizer.py`; eos ends a cut sample too, and is learned there.
    """

    def parts(record: Any, place: Place) -> list[Part]:
        user, answer = _turn(record, place)
        return [
            Part(USER_MARK + user, False),
            Part((ids.eoh, ids.newline), False),
            Part(BOT_MARK, False),
            Part(answer, True),
            Part((ids.eoa, ids.newline), True),
        ]

    return Recipe(
        kind="alpaca",
        parts=parts,
        frame=Frame(bos=(ids.bos,), eos=(ids.eos,), reference=True),
        framing=(ids.eoh, ids.eoa),
        guarded=not compat,
        settings={"pieces": ids._asdict(), "compat": "reference" if compat else None},
    )


def tokenize_alpaca(
    dataset: str,
    output: str | os.PathLike[str],
    *,
    tokenizer: TextTokenizer,
    split_ratio: float = 0.1,
    seed: int = 0,
    limit: Limit = Limit(max_tokens=MAX_TOKENS),
    eoh: str | None = None,
    eoa: str | None = None,
    compat: bool = False,
    data_type: str = "en",
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress_to: IO[str] | None = None,
) -> Outcome:
    """Tokenize a data set into `output/train/en` and `output/valid/en`; returns what went into each.

    Raises:
        DataFormatError: The data set or the output is unusable; then nothing has changed on disk.
        TokenizerError: The model lacks a piece.
    """
    split = Split(split_ratio, seed, replace=compat)
    ids = chat_ids(tokenizer, eoh=eoh, eoa=eoa, compat=compat)
    for name, number in ((EOH, ids.eoh), (EOA, ids.eoa)):
        if number >= tokenizer.vocab_size:
            warn(f"the reference's id {number} of {name} is outside {tokenizer.name} ({tokenizer.vocab_size} pieces)")
    return tokenize_records(
        alpaca_recipe(ids, compat=compat),
        dataset,
        output,
        tokenizer=tokenizer,
        split=split,
        limit=limit,
        data_type=data_type,
        overwrite=overwrite,
        # the reference saves an empty list as a float64 array
        empty_meta="float64" if compat else None,
        progress_to=progress_to,
    )


def _turn(record: Any, place: Place) -> tuple[str, str]:
    """Question and answer; raises where a record is none of Alpaca's. `input` may be missing."""
    keys = ("instruction", "output")
    missing = [key for key in keys if key not in record] if isinstance(record, dict) else keys
    if missing:
        lacks = " and ".join(f'"{key}"' for key in missing)
        raise place.error(f'it lacks {lacks}; a record reads {{"instruction": …, "input": …, "output": …}}')

    def text(key: str) -> str:
        return string_field(record, key, path=place.path, line=place.line)

    extra = text("input") if "input" in record else ""
    return text("instruction") + (f"\n{extra}" if extra else ""), text("output")
