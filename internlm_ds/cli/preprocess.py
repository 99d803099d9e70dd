"""`internlm-ds preprocess text|alpaca`, and the options that the scripts in `preprocessing/` share with it.

Parses and prints; the work is `internlm_ds.preprocess`'s, imported when it is to be done.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from internlm_ds.errors import DataFormatError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sub-commands `text` and `alpaca`."""
    commands = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    about = "tokenize .txt, .json and .jsonl files (also .gz, .zst) into one bin/meta pair"
    text = commands.add_parser("text", help=about, description=about, allow_abbrev=False)
    text.add_argument("inputs", nargs="+", metavar="IN", help="files or globs")
    text.add_argument("--output", required=True, metavar="OUT.bin", help="the bin to write; its folder is created")
    add_text_options(text)
    about = "tokenize an instruction data set with Alpaca's fields into train/en and valid/en"
    alpaca = commands.add_parser("alpaca", help=about, description=about, allow_abbrev=False)
    alpaca.add_argument("dataset", metavar="DATASET", help="one JSON list of records, or .jsonl (also .gz, .zst)")
    alpaca.add_argument("output", metavar="OUTPUT", help="folder; train/en/dataset.bin and valid/en/dataset.bin in it")
    _add_tokenizer_option(alpaca)
    add_alpaca_options(alpaca)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Options of both text commands."""
    _add_tokenizer_option(parser)
    on_off = argparse.BooleanOptionalAction
    for piece, where in (("bos", "before"), ("eos", "behind")):
        about = f"put the {piece} piece {where} each sample (default: off; on with --compat reference)"
        parser.add_argument(f"--{piece}", action=on_off, default=None, help=about)
    about = "field of JSON records that holds the text (default: text, then content)"
    parser.add_argument("--text-key", "--text_key", metavar="KEY", help=about)
    about = "write byte for byte what InternEvo's tool of March 2024 writes; appends to an existing output"
    parser.add_argument("--compat", choices=["reference"], help=about)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="add to an existing output")
    _add_overwrite(existing)


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
    _add_overwrite(parser)


def _add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    about = "sentencepiece model (default: $INTERNLM_DS_TOKENIZER)"
    parser.add_argument("--tokenizer", "--tokenizer_path", metavar="MODEL", help=about)


def _add_overwrite(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    """Do the task; returns the exit code."""
    return run_text(args) if args.task == "text" else run_alpaca(args)


def run_text(args: argparse.Namespace, *, constant: str = "", folder: Path | None = None) -> int:
    """`args.inputs` to `args.output`.

    Args:
        constant: `TOKENIZER` of the script that calls.
        folder: The folder of that script, where a model may lie.

    Raises:
        InternlmDsError: What `guarded` prints.
    """
    from internlm_ds.preprocess.pretrain import TextOptions, tokenize_texts

    compat = args.compat == "reference"
    if compat and args.text_key is not None:
        _warn("--text-key has no effect with --compat reference, which tokenizes records as raw JSON")
    options = TextOptions.choose(bos=args.bos, eos=args.eos, text_key=args.text_key, compat=compat)
    with _FileErrors():
        summary = tokenize_texts(
            args.inputs,
            args.output,
            tokenizer=_load(args.tokenizer, constant, folder),
            options=options,
            append=args.append,
            overwrite=args.overwrite,
            warn=_warn,
            progress_to=sys.stderr,
        )
    print(summary)
    return 0


def run_alpaca(args: argparse.Namespace) -> int:
    """`args.dataset` to the folder `args.output`; prints the reference tool's two lines.

    Raises:
        InternlmDsError: What `guarded` prints.
    """
    from internlm_ds.preprocess.alpaca import MAX_TOKENS, tokenize_alpaca

    with _FileErrors():
        shares = tokenize_alpaca(
            args.dataset,
            args.output,
            tokenizer=_load(args.tokenizer, "", None),
            split_ratio=args.split_ratio,
            seed=args.seed,
            eoh=args.eoh,
            eoa=args.eoa,
            compat=args.compat == "reference",
            overwrite=args.overwrite,
            warn=_warn,
            progress_to=sys.stderr,
        )
    for name, share in zip(("train", "validation"), shares):
        print(f"number of {name} dataset: {share.samples}, number of {name} dataset token: {share.tokens}")
        if share.truncated:
            what = f"{share.truncated} of {share.samples} {name} samples were cut at {MAX_TOKENS} tokens"
            _warn(f"{what}, {share.truncated_tokens} tokens lost")
        if not share.samples:
            _warn(f"no {name} samples: {share.path} is empty")
    return 0


def _load(given: str | None, constant: str, folder: Path | None) -> Any:
    from internlm_ds.preprocess.tokenizers import Tokenizer, find_model

    return Tokenizer(find_model(given, environ=os.environ, constant=constant, folder=folder))


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class _FileErrors:
    """What the system refuses (no permission, disk full) becomes an error with the file's name."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            path = error.filename if isinstance(error.filename, str) else None
            raise DataFormatError(error.strerror or str(error), path=path) from error
