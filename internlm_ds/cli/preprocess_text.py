"""`internlm-ds preprocess text`, and the options that `preprocessing/tokenizer.py` shares with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from internlm_ds.cli.preprocess_common import FileErrors, add_overwrite, add_tokenizer_option, load_tokenizer, warn

ENGINES = ("auto", "compiled", "arrays", "sentencepiece")


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
    add_scale_options(parser)


def add_scale_options(parser: argparse.ArgumentParser) -> None:
    """Options on how the work is done."""
    about = "threads (default: one for each CPU, at most 16); the output does not depend on it"
    parser.add_argument("--workers", type=int, metavar="N", help=about)
    about = (
        "write OUT-00000.bin, OUT-00001.bin, …; each is closed by the sample with which it reaches this size (K, M, G)"
    )
    parser.add_argument("--shard-size", type=size_in_bytes, metavar="BYTES", help=about)
    about = "go on where a killed run of the same command stopped; nothing is done if its output is complete"
    parser.add_argument("--resume", action="store_true", help=about)
    about = "write the ids as numbers beside each bin too (internlm-ds data side-file)"
    parser.add_argument("--side-file", action="store_true", help=about)
    about = "hold every sample against sentencepiece (slow)"
    parser.add_argument("--verify", action="store_true", help=about)
    about = "what tokenizes: auto (the default) takes the fastest that the model allows; all give the same"
    parser.add_argument("--engine", choices=ENGINES, default="auto", help=about)


def size_in_bytes(text: str) -> int:
    """A number of bytes with K, M or G (1024 each) behind it.

    >>> size_in_bytes("2G"), size_in_bytes("1.5k")
    (2147483648, 1536)
    """
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 1)
    try:
        size = int(float(text if factor == 1 else text[:-1]) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write bytes, or 500K, 64M, 2G")
    return size


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
    from internlm_ds.preprocess.pretrain import TextOptions, Work, tokenize_texts

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
            work=Work(
                workers=args.workers,
                shard_bytes=args.shard_size,
                resume=args.resume,
                verify=args.verify,
                engine=args.engine,
            ),
            append=args.append,
            overwrite=args.overwrite,
            warn=warn,
            progress_to=sys.stderr,
        )
        if args.side_file:
            from internlm_ds.data import side_file

            for path in summary.paths:
                if side_file.find(path) is None:
                    side_file.make(path)
    print(summary)
    return 0
