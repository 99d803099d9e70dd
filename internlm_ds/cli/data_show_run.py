"""`internlm-ds data show --run RUN_DIR`: the documents of a step; printing only, the finding is `data.run_batches`'."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

from internlm_ds.errors import DataFormatError, TokenizerError


def run_show_run(
    run: str, *, step: int | None, top_loss: int | None = None, tokenizer: str | None = None, as_json: bool = False
) -> int:
    """Print the documents of a batch, of the batches with the largest losses, or of both.

    Args:
        run: A run directory.
        step: Batch index, as `step` in metrics.jsonl.
        top_loss: How many of the batches with the largest losses.
        tokenizer: A sentencepiece model; None: the one the environment names, else nothing is decoded.
        as_json: One JSON object with whole texts, in the place of lines with their beginnings.
    Returns:
        0.
    Raises:
        DataFormatError: There is no such batch, or the data has changed too much to tell.
        TokenizerError: The tokenizer cannot be read.
    """
    from internlm_ds.data.run_batches import RunBatches, as_text

    batches = RunBatches(run)
    indices = _asked(batches, step, top_loss)
    decode = _decoder(tokenizer, batches.provenance(indices[0]))
    found = [batches.documents(index, decode=decode) for index in indices]
    skipping = batches.without(indices)
    if as_json:
        print(json.dumps({"run": run, "batches": found, "skip_batches": skipping}, indent=1, ensure_ascii=False))
        return 0
    for batch in found:
        print("\n".join(as_text(batch)))
    what = "this batch" if len(indices) == 1 else "these batches"
    print(f'to leave {what} out: data.skip_batches = "{skipping}"')
    return 0


def _asked(batches: Any, step: int | None, top_loss: int | None) -> list[int]:
    if step is None and top_loss is None:
        raise DataFormatError("which batch of the run? give --step N, or --top-loss K for those with the largest loss")
    if (step is not None and step < 0) or (top_loss is not None and top_loss < 1):
        raise DataFormatError("--step counts from 0, --top-loss from 1")
    worst = [] if top_loss is None else batches.worst(top_loss)
    if top_loss is not None and not worst:
        raise DataFormatError("no step has been written to metrics.jsonl yet", path=batches.run_dir)
    return list(dict.fromkeys([*([] if step is None else [step]), *worst]))


def _decoder(given: str | None, bins: Iterable[str]) -> Any:
    """The function that decodes; None, with a word on stderr, where no tokenizer is known."""
    from internlm_ds.preprocess.decode import open_decoder
    from internlm_ds.preprocess.tokenizers import find_model

    try:
        path = find_model(given, environ=os.environ)
    except TokenizerError:
        if given is not None or os.environ.get("INTERNLM_DS_TOKENIZER"):
            raise
        made_with = _noted_tokenizers(bins)
        hint = f"; these were made with {', '.join(made_with)}" if made_with else ""
        print(f"no text is shown without --tokenizer MODEL{hint}", file=sys.stderr)
        return None
    return open_decoder(path).text


def _noted_tokenizers(bins: Iterable[str]) -> list[str]:
    """Names of the tokenizers that preprocessing noted beside the bins."""
    found = {}
    for path in bins:
        try:
            with open(f"{path}.json", encoding="utf-8") as file:
                found[json.load(file)["tokenizer"]["name"]] = None
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return list(map(str, found))
