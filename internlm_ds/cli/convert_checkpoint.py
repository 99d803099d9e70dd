"""`internlm-ds convert-checkpoint SRC DST --from F --to F`: the door to `convert.run`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from internlm_ds.errors import ConversionError

FORMATS = ("native", "internlm", "hf")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder: a plain path or local:/path")
    parser.add_argument("target", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--from", dest="source_format", choices=FORMATS, help="default: told by what lies in SRC")
    parser.add_argument("--to", dest="target_format", choices=FORMATS, required=True)
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor ranks of the target (internlm)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline stages of the target (internlm)")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="chunks per stage of the target (internlm)")
    parser.add_argument(
        "--zero1", type=int, default=1, metavar="N", help="optimizer files per tensor rank and stage (internlm, all)"
    )
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="configuration of the model, if SRC does not say")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as stored")
    parser.add_argument("--content", choices=("model", "all"), default="model", help="default: model")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="sentencepiece model to copy along (hf)")
    parser.add_argument("--max-shard-size", default="10GB", metavar="SIZE", help="largest file, like 5GB (hf)")
    parser.add_argument(
        "--mlp-names", choices=("2023", "2024"), help="meaning of w2, w3 if shapes do not tell (internlm)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")


def run(args: argparse.Namespace) -> int:
    max_shard_bytes = parse_size(args.max_shard_size)
    from internlm_ds.convert.run import Request, convert

    request = Request(
        source=args.source,
        target=args.target,
        source_format=args.source_format,
        target_format=args.target_format,
        tensor=args.tensor,
        pipe=args.pipeline,
        chunks=args.chunks,
        zero=args.zero1,
        config=args.config,
        dtype=args.dtype,
        content=args.content,
        tokenizer=args.tokenizer,
        max_shard_bytes=max_shard_bytes,
        mlp_names=args.mlp_names,
        verify=not args.no_verify,
    )
    print(convert(request, progress=lambda line: print(line, file=sys.stderr)))
    return 0


def parse_size(text: str) -> int:
    """Bytes of a size like `10GB` or `500MB` (powers of ten).

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ConversionError(f"--max-shard-size {text!r}: write a size like 10GB, 500MB or a number of bytes")
    return size
