"""`internlm-ds preprocess alpaca`, and the options that `preprocessing/alpaca_tokenizer.py` shares with it."""

from __future__ import annotations

import argparse
import sys

from internlm_ds.cli.preprocess_common import FileErrors, add_overwrite, add_tokenizer_option, load_tokenizer, warn


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="one JSON list of records, or .jsonl (also .gz, .zst)")
    parser.add_argument("output", metavar="OUTPUT", help="folder; train/en/dataset.bin and valid/en/dataset.bin in it")
    add_tokenizer_option(parser)
    add_alpaca_options(parser)


def add_alpaca_options(parser: argparse.ArgumentParser) -> None:
    """Options of both alpaca commands."""
    about = "share of the samples that goes to validation (default: 0.1)"
    parser.add_argument("--split-ratio", "--split_ratio", type=float, default=0.1, metavar="R", help=about)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (default: 0)")
    for name, whose in (("eoh", "the human's"), ("eoa", "the assistant's")):
        about = f"piece or id that ends {whose} turn (default: <{name}>)"
        parser.add_argument(f"--{name}", metavar="PIECE", help=about)
    about = "byte for byte what InternEvo's tool of March 2024 writes: its fixed ids, validation drawn with replacement"
    parser.add_argument("--compat", choices=["reference"], help=about)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    return run_alpaca(args)


def run_alpaca(args: argparse.Namespace) -> int:
    """`args.dataset` to the folder `args.output`; prints the reference tool's two lines.

    Raises:
        InternlmDsError: What `guarded` prints.
    """
    from internlm_ds.preprocess.alpaca import MAX_TOKENS, tokenize_alpaca

    with FileErrors():
        shares = tokenize_alpaca(
            args.dataset,
            args.output,
            tokenizer=load_tokenizer(args.tokenizer),
            split_ratio=args.split_ratio,
            seed=args.seed,
            eoh=args.eoh,
            eoa=args.eoa,
            compat=args.compat == "reference",
            overwrite=args.overwrite,
            warn=warn,
            progress_to=sys.stderr,
        )
    for name, share in zip(("train", "validation"), shares):
        print(f"number of {name} dataset: {share.samples}, number of {name} dataset token: {share.tokens}")
        if share.truncated:
            what = f"{share.truncated} of {share.samples} {name} samples were cut at {MAX_TOKENS} tokens"
            warn(f"{what}, {share.truncated_tokens} tokens lost")
        if not share.samples:
            warn(f"no {name} samples: {share.path} is empty")
    return 0
