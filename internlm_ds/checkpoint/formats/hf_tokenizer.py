"""The tokenizer's files of a Hugging Face folder: a sentencepiece model with what `LlamaTokenizer` needs beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internlm_ds.checkpoint import diskfile
from internlm_ds.errors import ConversionError

BOS, EOS, PAD = 1, 2, 2


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, through to the disk."""
    diskfile.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write(folder: Path, tokenizer: Path) -> tuple[int, int, int]:
    """Copy a sentencepiece model into a folder; returns the ids of bos, eos and pad.

    Raises:
        ConversionError: It is none.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"tokenizer {tokenizer} is no sentencepiece model that can be read: {error}") from error
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    bos, eos = (i if i >= 0 else default for i, default in ((processor.bos_id(), BOS), (processor.eos_id(), EOS)))
    pieces = {"bos_token": bos, "eos_token": eos, "unk_token": processor.unk_id(), "pad_token": eos}
    special = {key: processor.IdToPiece(number) for key, number in pieces.items()}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # the newer way of transformers puts a blank of its own in front of every text
        "legacy": True,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)
    return bos, eos, eos
