"""Which engine encodes: chosen, held against sentencepiece on a sample, given up loudly where they differ.

`row_encoder` is what the pipeline calls; `first_difference` is the whole comparison, for `--verify`. Nothing here
imports numba unless the compiled engine is chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from internlm_ds.errors import TokenizerError
from internlm_ds.preprocess.engine import machine_code, model_file, table_cache
from internlm_ds.preprocess.engine.plain_rows import PlainRows, texts_of
from internlm_ds.preprocess.engine.tables import MAX_PIECES, Tables, build, with_user_pieces
from internlm_ds.preprocess.rows import RowEncoder, Rows, TextBlock
from internlm_ds.preprocess.tokenizers import PlainEncoder, ReferenceEncoder, Tokenizer

EngineName = Literal["auto", "compiled", "arrays", "sentencepiece"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
# below this an engine's own start takes longer than sentencepiece takes for the text
SMALL_INPUT_BYTES = 500_000
# and below this compiling it does, once for a machine
COMPILED_FOR_BYTES = 8_000_000
_SAMPLE_CHARS, _SAMPLE_TEXT_CHARS = 40_000, 4_000
# of everything that engines have gone wrong on; always part of the check
_PROBES = (
    "The cat sat on the mat,  and   it's 12345.678 o'clock.\n\tif x == 1:\n        return x\r\n",
    "自然语言处理的结果，是“很好”的。——……「日本語」ＡＢＣ１２３ 한국어 العربية ไทย",
    "\u2581 a\u2581b \u200b\ufeff e\u0301 👩‍👩‍👧 🇨🇳 \x01\x7f\0x\ue000\U00010ffff",
    "<unk><s></s><0x0A><eoh>[UNUSED_TOKEN_1]=====" + "ab" * 700,
)


def row_encoder(
    tokenizer: Tokenizer,
    *,
    before: Sequence[int] = (),
    behind: Sequence[int] = (),
    sample: Iterable[str] = (),
    num_bytes: int | None = None,
    compat: bool = False,
    engine: EngineName = "auto",
    warn: Callable[[str], None] = lambda text: None,
) -> RowEncoder:
    """The engine for this model: the fastest that gives sentencepiece's ids.

    Args:
        before, behind: Ids put before and behind each sample (bos, eos).
        sample: Some texts of the input; the engine must encode them as sentencepiece does.
        num_bytes: Bytes of text to come, None for unknown or much; for little text nothing is compiled.
        compat: Literal `<unk>`, `<s>`, `</s>` are their ids, as in `ReferenceEncoder`.
        engine: "auto", or one by name.
        warn: Is told when an engine could not be used although it should.

    Raises:
        TokenizerError: An engine that was asked for by name cannot be used with this model.
    """
    truth = ReferenceEncoder(tokenizer) if compat else PlainEncoder(tokenizer)
    plain = PlainRows(truth, before=before, behind=behind, engine=tokenizer.library)
    if engine == "sentencepiece" or (engine == "auto" and _is_little(num_bytes)):
        return plain
    try:
        tables = _tables(tokenizer)
        if isinstance(truth, ReferenceEncoder):
            tables = with_user_pieces(tables, truth.specials)
    except ValueError as error:
        if engine == "auto":
            return plain
        message = f"the engine {engine} cannot stand in for {plain.engine} with {tokenizer.name}: {error}"
        raise TokenizerError(f"{message}; use auto") from None
    chosen = _build(tables, truth, before=before, behind=behind, engine=engine, warn=warn)
    wrong = disagreement(chosen, plain, sample=sample)
    if wrong is None:
        return chosen
    warn(
        f"the {chosen.engine} engine and sentencepiece disagree about {_shown(wrong)} with {tokenizer.name} "
        f"(sha256 {tokenizer.sha256}): sentencepiece does all the work, slower. Please report this"
    )
    return plain


def first_difference(block: TextBlock, rows: Rows, plain: RowEncoder) -> int | None:
    """Index of the first text of a block whose row is not what `plain`, sentencepiece's encoder, makes of it."""
    expected = plain.encode(block)
    data, wanted = memoryview(rows.data), memoryview(expected.data)
    if data == wanted and rows.largest_id == expected.largest_id:
        pairs = ((rows.sizes, expected.sizes), (rows.lengths, expected.lengths))
        if all(np.array_equal(ours, theirs) for ours, theirs in pairs):
            return None
    place = other = 0
    for i, (size, own) in enumerate(zip(rows.sizes.tolist(), expected.sizes.tolist())):
        if data[place : place + size] != wanted[other : other + own] or rows.lengths[i] != expected.lengths[i]:
            return i
        place, other = place + size, other + own
    return 0


def disagreement(chosen: RowEncoder, plain: RowEncoder, *, sample: Iterable[str]) -> str | None:
    """A text that two encoders make different rows of, None if there is none in the sample."""
    block = TextBlock.of([*_PROBES, *_some(sample)])
    try:
        index = first_difference(block, chosen.encode(block), plain)
    except Exception as error:
        return f"({type(error).__name__}: {error})"
    return None if index is None else texts_of(block)[index]


def _is_little(num_bytes: int | None) -> bool:
    """Whether starting an engine would take longer than it saves."""
    if num_bytes is None or num_bytes >= COMPILED_FOR_BYTES:
        return False
    return num_bytes < SMALL_INPUT_BYTES or not machine_code.is_kept()


def _tables(tokenizer: Tokenizer) -> Tables:
    """Raises ValueError, with the reason, for a model that is not for these engines."""

    if tokenizer.library != "sentencepiece":
        raise ValueError("it is no sentencepiece model")

    def build_tables() -> Tables:
        model = model_file.parse(Path(tokenizer.path).read_bytes())
        if reason := model_file.why_not(model, max_pieces=MAX_PIECES):
            raise ValueError(reason)
        return build(model)

    folder = table_cache.cache_folder(os.environ)
    return table_cache.load_or_build(tokenizer.sha256, build_tables, folder=folder)


def _build(
    tables: Tables,
    truth: PlainEncoder | ReferenceEncoder,
    *,
    before: Sequence[int],
    behind: Sequence[int],
    engine: EngineName,
    warn: Callable[[str], None],
) -> RowEncoder:
    if engine != "arrays":
        try:
            from internlm_ds.preprocess.engine.fast_rows import FastRows

            return FastRows(tables, truth, before=before, behind=behind)
        except Exception as error:
            # an installation without a working numba still tokenizes
            if engine == "compiled":
                raise TokenizerError(f"the compiled engine needs a working numba: {error}") from None
            warn(f"no working numba ({error}): tokenizing with arrays, several times slower")
    from internlm_ds.preprocess.engine.array_rows import ArrayRows

    return ArrayRows(tables, truth, before=before, behind=behind)


def _some(sample: Iterable[str]) -> Iterator[str]:
    """The first texts of a sample, long ones cut."""
    left = _SAMPLE_CHARS
    for text in sample:
        part = text[:_SAMPLE_TEXT_CHARS]
        left -= len(part)
        yield part
        if left <= 0:
            return


def _shown(text: str) -> str:
    return repr(text if len(text) < 120 else text[:120] + "…")
