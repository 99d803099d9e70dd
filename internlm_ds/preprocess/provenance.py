"""`OUT.bin.json`: where the tokens of a bin come from. Written beside the bin, together with it.

Fields: `format` (1), `tool` {name, version}, `kind` ("text", "alpaca", "chat", "custom"), `tokenizer` {name, sha256,
vocab_size}, `bos`, `eos` (bool), `text_key` (null: text, then content), `compat` (null or "reference"), `sources` (one
entry a file: path, bytes, sha256, samples, tokens, …), `counts` {samples, tokens, bytes, largest_id, …}, `shard`
{index, count, bytes} where the output is in several bins, and what `sft` adds (`share`, `split_ratio`, `seed`,
`pieces`, …). Ids are checked against a model's vocabulary by `counts.largest_id`, or `tokenizer.vocab_size` where that
is null.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm_ds import __version__
from internlm_ds.data.binformat import meta_path
from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.tokenizers import Tokenizer

SUFFIX = ".json"
FORMAT = 1


def provenance_path(path: str | os.PathLike[str]) -> Path:
    """The provenance file of a bin: its name with `.json` behind it."""
    return Path(f"{os.fspath(path)}{SUFFIX}")


def describe(
    tokenizer: Tokenizer,
    *,
    kind: str,
    settings: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of one run; `settings` are the keys between tokenizer and sources."""
    return {
        "format": FORMAT,
        "tool": {"name": "internlm-ds", "version": __version__},
        "kind": kind,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        **settings,
        "sources": list(sources),
        "counts": dict(counts),
    }


def encode(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogateescape")


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record beside the bin `path`, None where there is none.

    Raises:
        DataFormatError: The file is damaged.
    """
    target = provenance_path(path)
    if not target.is_file():
        return None
    try:
        record = json.loads(target.read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record["counts"], dict) and isinstance(record["sources"], list):
            return record
    except (ValueError, KeyError):
        pass
    message = "no provenance record; delete the file to go on without it"
    raise DataFormatError(message, path=str(target))


def check_same_tokens(
    earlier: Mapping[str, Any], tokenizer: Tokenizer, *, bos: bool, eos: bool, path: str | os.PathLike[str]
) -> None:
    """Refuse to append what was made by another tokenizer, or with other bos and eos, than the bin's samples.

    Raises:
        DataFormatError: They differ.
    """
    known = earlier.get("tokenizer", {})
    if known.get("sha256") != tokenizer.sha256:
        what = f"its samples were made with another tokenizer ({known.get('name')}) than {tokenizer.path}"
    elif (earlier.get("bos"), earlier.get("eos")) != (bos, eos):
        was = f"bos={earlier.get('bos')}, eos={earlier.get('eos')}"
        what = f"its samples were made with {was}, these would have bos={bos}, eos={eos}"
    else:
        return
    message = f"cannot append: {what}. Use the same, write another file, or --overwrite"
    raise DataFormatError(message, path=os.fspath(path))


def extended(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The record after an append: sources one behind the other, counts added, the rest as in the last run."""
    before, now = earlier["counts"], record["counts"]
    counts = {key: before.get(key, 0) + value for key, value in now.items() if key not in ("bytes", "largest_id")}
    largest = [before.get("largest_id"), now["largest_id"]]
    counts["bytes"] = now["bytes"]
    counts["largest_id"] = None if None in largest else max(largest)
    return {**record, "sources": [*earlier["sources"], *record["sources"]], "counts": counts}


def unrecorded(path: str | os.PathLike[str], *, samples: int, tokens: int) -> dict[str, Any]:
    """A stand-in for the record of a bin that was written without one."""
    counts = {"samples": samples, "tokens": tokens, "bytes": 0, "largest_id": None}
    source = {"path": os.fspath(path), "note": "already in the bin, origin not recorded", **counts}
    del source["bytes"], source["largest_id"]
    return {"sources": [source], "counts": counts}


def made_otherwise(
    paths: Sequence[Path], expected: Mapping[str, Any], inputs: Sequence[tuple[str, int]], *, shard_bytes: int | None
) -> str | None:
    """Why the bins are not what a run with the settings of `expected` over `inputs` makes; None if they are.

    Args:
        paths: All bins of the output, in order.
        inputs: Path and size of each input.
    """
    sources: dict[str, int] = {}
    for index, path in enumerate(paths):
        record = read(path)
        if record is None:
            return f"{provenance_path(path)} is missing"
        shard = None if shard_bytes is None else {"index": index, "count": len(paths), "bytes": shard_bytes}
        keys = ("kind", "bos", "eos", "text_key", "compat")
        wanted = {**{key: expected.get(key) for key in keys}, "tokenizer": expected["tokenizer"], "shard": shard}
        for key, value in wanted.items():
            if record.get(key) != value:
                return f"{key} was {record.get(key)}, now {value}"
        if record["counts"].get("bytes") != path.stat().st_size or not meta_path(path).is_file():
            return "its size or its meta are not what was written"
        sources |= {source["path"]: source.get("bytes", -1) for source in record["sources"]}
    if sources != dict(inputs):
        changed = sorted({name for name, _ in {*sources.items()} ^ {*inputs}})
        return f"the inputs are not the same ({', '.join(changed[:4])})"
    return None
