"""A small sentencepiece model trained on one's own text, of the kind that InternLM uses. The demo needs one."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from internlm_ds.data.binformat import write_whole
from internlm_ds.errors import TokenizerError

_MAX_LINE_CHARS = 1000  # the trainer drops sentences beyond 4192 bytes; a character has four at most


def train_tokenizer(
    texts: Iterable[str],
    output: str | os.PathLike[str],
    *,
    vocab_size: int,
    max_chars: int = 4_000_000,
    control_pieces: Sequence[str] = (),
) -> Path:
    """Train a BPE model: byte fallback, identity normaliser, no dummy prefix, unk/bos/eos = 0/1/2.

    Args:
        texts: The text to learn from; read until `max_chars` characters are there.
        output: The `.model` file to write; its folder is created.
        vocab_size: Pieces in all, the 256 bytes and the control pieces included.
        control_pieces: Further pieces, such as `<eoh>` and `<eoa>`, that text never turns into.

    Raises:
        TokenizerError: There is no text, or too little for this vocabulary.
    """
    import sentencepiece

    lines = _lines(texts, max_chars=max_chars)
    first = next(lines, None)
    if first is None:
        raise TokenizerError("no text to train a tokenizer on")
    model = io.BytesIO()
    sentencepiece.set_min_log_level(2)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chained(first, lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(control_pieces),
            num_threads=min(8, os.cpu_count() or 1),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {error}") from None
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(output), model.getvalue())
    return Path(output)


def _lines(texts: Iterable[str], *, max_chars: int) -> Iterator[str]:
    """Non-empty pieces of lines; a newline itself is a byte piece, the trainer must not see it."""
    left = max_chars
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _MAX_LINE_CHARS):
                piece = line[start : start + _MAX_LINE_CHARS].replace("\0", " ")
                left -= len(piece)
                yield piece
                if left <= 0:
                    return


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
