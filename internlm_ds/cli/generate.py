"""`internlm-ds generate`: continue a prompt with a trained model."""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a native checkpoint, <save folder>/<step>")
    parser.add_argument("--tokenizer", metavar="MODEL", help="sentencepiece model; default: $INTERNLM_DS_TOKENIZER")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=_count, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=_temperature, default=1.0, metavar="T", help="0 = likeliest token; default: %(default)s"
    )
    parser.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="nucleus sampling; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1024, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    # torch is imported here, so that --help and wrong options answer at once
    from internlm_ds.generate.run import Settings, generate
    from internlm_ds.preprocess.tokenizers import find_model

    tokenizer = find_model(args.tokenizer, environ=os.environ)
    settings = Settings(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    print(generate(args.checkpoint, tokenizer_path=tokenizer, prompt=args.prompt, settings=settings))
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give a number of tokens, 0 or more")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is no temperature; give a number, 0 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no probability; give a number above 0, up to 1")
    return value
