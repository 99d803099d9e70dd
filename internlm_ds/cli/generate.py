"""`internlm-ds generate`: continue a prompt with a trained model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internlm_ds.errors import ConfigError

NAMES = ("internlm", "internlm2")
PIECES = ("eoh", "eoa", "im_start", "im_end")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint folder of any format, like <save folder>/<step>"
    )
    parser.add_argument("--tokenizer", metavar="MODEL", help="tokenizer model; default: $INTERNLM_DS_TOKENIZER")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue, or a question")
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="of the model, if the checkpoint does not say")
    parser.add_argument("--template", choices=NAMES, help="the prompt is a user's turn of a chat; prints the answer")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message of the chat")
    for piece in PIECES:
        option = f"--{piece.replace('_', '-')}"
        parser.add_argument(option, metavar="PIECE", help=f"piece or id of {piece} in the template")
    parser.add_argument("--max-new-tokens", type=_count, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=_temperature, default=1.0, metavar="T", help="0 = likeliest token; default: %(default)s"
    )
    parser.add_argument("--top-p", type=_share, default=1.0, metavar="P", help="nucleus sampling; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1024, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    # torch is imported here, so that --help and wrong options answer at once
    from internlm_ds.generate.chat import Chat
    from internlm_ds.generate.run import Settings, generate
    from internlm_ds.preprocess.tokenizers import find_model

    tokenizer = find_model(args.tokenizer, environ=os.environ)
    settings = Settings(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    pieces = {piece: given for piece in PIECES if (given := getattr(args, piece))}
    if not args.template and (args.system or pieces):
        raise ConfigError("--system and the pieces of a chat need --template")
    chat = Chat(args.template, args.system, pieces) if args.template else None
    text = generate(
        args.checkpoint,
        tokenizer_path=tokenizer,
        prompt=args.prompt,
        settings=settings,
        chat=chat,
        config=args.config,
    )
    print(text)
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
