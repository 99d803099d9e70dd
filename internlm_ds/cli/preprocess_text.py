"""`internlm-ds preprocess text`, and the options that `preprocessing/tokenizer.py` shares with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from internlm_ds.cli.preprocess_common import FileErrors, add_overwrite, add_tokenizer_option, load_tokenizer, warn


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help="files or globs")
    parser.add_argument("--output", required=True, metavar="OUT.bin", help="the bin to write; its folder is created")
    add_text_options(parser)


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Options of both text commands."""
    add_tokenizer_option(parser)
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
    add_overwrite(existing)


def run(args: argparse.Namespace) -> int:
    return run_text(args)


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
        warn("--text-key has no effect with --compat reference, which tokenizes records as raw JSON")
    options = TextOptions.choose(bos=args.bos, eos=args.eos, text_key=args.text_key, compat=compat)
    with FileErrors():
        summary = tokenize_texts(
            args.inputs,
            args.output,
            tokenizer=load_tokenizer(args.tokenizer, constant=constant, folder=folder),
            options=options,
            append=args.append,
            overwrite=args.overwrite,
            warn=warn,
            progress_to=sys.stderr,
        )
    print(summary)
    return 0
