"""`internlm-ds preprocess alpaca|chat|custom`; `preprocessing/alpaca_tokenizer.py` shares the options of the first."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from internlm_ds.cli.preprocess_common import FileErrors, add_overwrite, add_tokenizer_option, load_tokenizer, warn

ALPACA_MAX_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="one JSON list of records, or .jsonl (also .gz, .zst)")
    about = "folder; train/TYPE/dataset.bin and valid/TYPE/dataset.bin in it"
    parser.add_argument("output", metavar="OUTPUT", help=about)
    add_tokenizer_option(parser)
    {"alpaca": add_alpaca_options, "chat": _add_chat_options, "custom": _add_custom_options}[task](parser)


def add_alpaca_options(parser: argparse.ArgumentParser) -> None:
    """Options of both alpaca commands."""
    _add_share_options(parser, max_tokens=ALPACA_MAX_TOKENS)
    _add_turn_pieces(parser)
    about = "byte for byte what InternEvo's tool of March 2024 writes: its fixed ids, validation drawn with replacement"
    parser.add_argument("--compat", choices=["reference"], help=about)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    about = "internlm: <|User|>: … <eoh> <|Bot|>: … <eoa>; internlm2: <|im_start|>role … <|im_end|>"
    parser.add_argument("--template", choices=["internlm", "internlm2"], required=True, help=about)
    _add_share_options(parser, max_tokens=None)
    _add_frame(parser, eos="on for internlm, off for internlm2")
    _add_turn_pieces(parser)
    for name, piece in (("im-start", "<|im_start|>"), ("im-end", "<|im_end|>")):
        about = f"piece or id for {piece} (default: the piece of that name, or InternLM2's for it)"
        parser.add_argument(f"--{name}", metavar="PIECE", help=about)


def _add_custom_options(parser: argparse.ArgumentParser) -> None:
    about = 'makes a sample of a record: a list such as [("question", False), ("answer", True)]'
    parser.add_argument("--function", metavar="FILE.py:NAME", required=True, help=about)
    _add_share_options(parser, max_tokens=None)
    _add_frame(parser, eos="on")


def _add_share_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    about = "share of the records that goes to validation (default: 0.1)"
    parser.add_argument("--split-ratio", "--split_ratio", type=float, default=0.1, metavar="R", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (default: 0)")
    about = "folder of the output that names the data's type: cn, en, code, … (default: en)"
    parser.add_argument("--type", default="en", metavar="TYPE", help=about)
    about = f"longest sample, bos and eos counted (default: {max_tokens or 'no limit'})"
    parser.add_argument("--max-tokens", "--max_tokens", type=int, default=max_tokens, metavar="N", help=about)
    about = "what becomes of a longer one: left out, cut, or made into several samples (default: cut)"
    parser.add_argument("--too-long", "--too_long", choices=["drop", "cut", "split"], default="cut", help=about)
    add_overwrite(parser)


def _add_turn_pieces(parser: argparse.ArgumentParser) -> None:
    for name, whose in (("eoh", "the human's"), ("eoa", "the assistant's")):
        about = f"piece or id that ends {whose} turn (default: <{name}>)"
        parser.add_argument(f"--{name}", metavar="PIECE", help=about)


def _add_frame(parser: argparse.ArgumentParser, *, eos: str) -> None:
    on_off = argparse.BooleanOptionalAction
    for piece, where, default in (("bos", "before", "on"), ("eos", "behind", eos)):
        about = f"put the {piece} piece {where} each sample (default: {default})"
        parser.add_argument(f"--{piece}", action=on_off, default=None, help=about)


def run(args: argparse.Namespace) -> int:
    return {"alpaca": run_alpaca, "chat": _run_chat, "custom": _run_custom}[args.task](args)


def run_alpaca(args: argparse.Namespace) -> int:
    """`args.dataset` to the folder `args.output`; prints the reference tool's two lines.

    Raises:
        InternlmDsError: What `guarded` prints.
    """
    from internlm_ds.preprocess.alpaca import tokenize_alpaca
    from internlm_ds.preprocess.samples import Limit

    with FileErrors():
        outcome = tokenize_alpaca(
            args.dataset,
            args.output,
            tokenizer=load_tokenizer(args.tokenizer),
            split_ratio=args.split_ratio,
            seed=args.seed,
            limit=Limit(args.max_tokens, args.too_long),
            eoh=args.eoh,
            eoa=args.eoa,
            compat=args.compat == "reference",
            data_type=args.type,
            overwrite=args.overwrite,
            warn=warn,
            progress_to=sys.stderr,
        )
    _report(outcome, args)
    return 0


def _run_chat(args: argparse.Namespace) -> int:
    from internlm_ds.preprocess.chat import chat_recipe
    from internlm_ds.preprocess.templates import make_template

    tokenizer = load_tokenizer(args.tokenizer)
    pieces = {name: getattr(args, name) for name in ("eoh", "eoa", "im_start", "im_end")}
    given = {name: piece for name, piece in pieces.items() if piece is not None}
    template = make_template(args.template, tokenizer, given=given, bos=args.bos, eos=args.eos)
    return _run_recipe(chat_recipe(template), tokenizer, args)


def _run_custom(args: argparse.Namespace) -> int:
    from internlm_ds.preprocess.custom import custom_recipe, load_function
    from internlm_ds.preprocess.samples import Frame

    function = load_function(args.function)
    tokenizer = load_tokenizer(args.tokenizer)
    frame = Frame(
        bos=() if args.bos is False else (tokenizer.bos_id,), eos=() if args.eos is False else (tokenizer.eos_id,)
    )
    recipe = custom_recipe(function, name=args.function, frame=frame, vocab_size=tokenizer.vocab_size)
    return _run_recipe(recipe, tokenizer, args)


def _run_recipe(recipe: Any, tokenizer: Any, args: argparse.Namespace) -> int:
    from internlm_ds.preprocess.samples import Limit
    from internlm_ds.preprocess.sft import Split, tokenize_records

    with FileErrors():
        outcome = tokenize_records(
            recipe,
            args.dataset,
            args.output,
            tokenizer=tokenizer,
            split=Split(args.split_ratio, args.seed),
            limit=Limit(args.max_tokens, args.too_long),
            data_type=args.type,
            overwrite=args.overwrite,
            progress_to=sys.stderr,
        )
    _report(outcome, args)
    return 0


def _report(outcome: Any, args: argparse.Namespace) -> None:
    """The reference tool's lines on stdout, a warning for everything that was left out."""
    for name, share in (("train", outcome.train), ("validation", outcome.valid)):
        print(f"number of {name} dataset: {share.samples}, number of {name} dataset token: {share.tokens}")
        tally = share.tally
        if tally.truncated:
            what = f"{tally.truncated} of {share.samples} {name} samples were cut at {args.max_tokens} tokens"
            warn(f"{what}, {tally.truncated_tokens} tokens lost")
        if tally.dropped:
            what = f"{tally.dropped} {name} samples beyond {args.max_tokens} tokens were left out"
            warn(f"{what}, {tally.dropped_tokens} tokens lost")
        if tally.split:
            what = f"{tally.split} {name} samples beyond {args.max_tokens} tokens were made into {tally.split_parts}"
            warn(f"{what}, nothing lost")
        if tally.unlearned:
            what = f"{tally.unlearned} {name} samples with nothing to learn were left out"
            warn(f"{what}, {tally.unlearned_tokens} tokens lost")
        if not share.samples:
            warn(f"no {name} samples: {share.path} is empty")
    if outcome.skipped:
        warn(f"{outcome.skipped} records were left out by {args.function}")
