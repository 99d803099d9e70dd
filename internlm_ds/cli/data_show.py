"""`internlm-ds data show`: options and printing; what is shown is `data.doctor.display`'s."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from internlm_ds.cli.data_common import add_config_options, load_config
from internlm_ds.errors import DataFormatError


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("bin", nargs="?", metavar="BIN", help="a bin file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", type=int, metavar="K", help="sample K of BIN, from 0")
    which.add_argument("--line", type=int, metavar="N", help="line N of BIN, from 1, whatever its meta says")
    which.add_argument("--batch", type=int, metavar="N", help="batch N, from 0, of a run of --config")
    which.add_argument("--run", metavar="RUN_DIR", help="a run that was: batch --step of it, or --top-loss")
    parser.add_argument("--step", type=int, metavar="N", help="batch index, as step in metrics.jsonl")
    parser.add_argument("--top-loss", type=int, metavar="K", help="the K batches with the largest loss")
    add_config_options(parser, "the run that --batch belongs to; for a sample, its seq_len cuts segments")
    about = "ranks of that run: they share a batch (default: as few as the configuration allows)"
    parser.add_argument("--world-size", type=int, metavar="N", help=about)
    parser.add_argument("--rank", type=int, metavar="R", help="show the micro-batches of data-parallel rank R only")
    about = "the model that made the ids (default: $INTERNLM_DS_TOKENIZER; without one ids are shown)"
    parser.add_argument("--tokenizer", metavar="MODEL", help=about)
    parser.add_argument("--tokens", action="store_true", help="a line for each token of a sample")
    parser.add_argument("--limit", type=int, metavar="N", help="show at most N tokens of each part")
    parser.add_argument("--json", action="store_true", help="as JSON, in full")


def run(args: argparse.Namespace) -> int:
    """Show what was asked for.

    Raises:
        ConfigError, DataFormatError, LayoutError, TokenizerError: There is no such sample or batch, or it cannot be
            read.
    """
    if args.run is not None:
        from internlm_ds.cli.data_show_run import run_show_run

        return run_show_run(
            args.run, step=args.step, top_loss=args.top_loss, tokenizer=args.tokenizer, as_json=args.json
        )
    if args.batch is not None:
        if args.config is None or args.bin is not None:
            raise DataFormatError("--batch N shows a batch of a run: give --config CONFIG, and no BIN")
        return _show_batch(args)
    if args.bin is None or (args.sample is None and args.line is None):
        message = (
            "what shall be shown? BIN --sample K, BIN --line N, --config CONFIG --batch N, or --run RUN_DIR --step N"
        )
        raise DataFormatError(message)
    return _show_sample(args)


def _show_sample(args: argparse.Namespace) -> int:
    from internlm_ds.data.doctor import display

    tokens, line, offset = (
        _read_line(args.bin, args.line) if args.line is not None else _read_sample(args.bin, args.sample)
    )
    config = load_config(args)
    borders = display.segment_starts(len(tokens), seq_len=config.data.seq_len) if config else []
    runs = display.runs_of(tokens, borders=borders)
    decoder = _decoder(args)
    learned = sum(one.stop - one.start for one in runs if one.learned)
    if args.json:
        shown = [one.as_json(decoder and decoder.text) for one in runs]
        place = {"file": args.bin, "line": line, "offset_bytes": offset}
        _print_json({**place, "tokens": len(tokens), "learned": learned, "runs": shown})
        return 0
    print(f"{args.bin}, line {line}, byte {offset}: {len(tokens)} tokens, {learned} learned")
    if args.tokens:
        ids = tokens.tolist()
        lines = display.piece_lines(tokens, decoder.pieces(ids) if decoder else [""] * len(ids))
    else:
        lines = display.as_lines(runs, decoder and decoder.text, limit=args.limit, color=sys.stdout.isatty())
    for text in lines:
        print(text)
    return 0


def _read_sample(path: str, sample: int) -> tuple[Any, int, int]:
    """Tokens, line and offset of a sample, by the meta."""
    from internlm_ds.data.binmeta import Reader

    reader = Reader(path)
    if not 0 <= sample < len(reader):
        raise DataFormatError(f"there is no sample {sample}: its {len(reader)} samples are counted from 0", path=path)
    return reader.tokens(sample), sample + 1, int(reader.offsets[sample])


def _read_line(path: str, line: int) -> tuple[Any, int, int]:
    """Tokens, line and offset of a line, counted in the bin itself."""
    from internlm_ds.cli.preprocess_common import FileErrors
    from internlm_ds.data.binmeta import decode_line

    offset, number = 0, 0
    with FileErrors(), open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if number == line:
                return decode_line(text, path=path, line=line, offset_bytes=offset), line, offset
            offset += len(text)
    raise DataFormatError(f"there is no line {line}: its {number} lines are counted from 1", path=path)


def _show_batch(args: argparse.Namespace) -> int:
    from internlm_ds.data.doctor import batches

    trace, data_size = _trace(args)
    batch = trace.batch(args.batch)
    ranks = range(data_size) if args.rank is None else [args.rank]
    if args.rank is not None and not 0 <= args.rank < data_size:
        raise DataFormatError(f"there is no data-parallel rank {args.rank}: this run has {data_size}, counted from 0")
    decoder = _decoder(args)
    decode = decoder and decoder.text
    if args.json:
        _print_json(batches.as_json(trace, batch, ranks, decode))
    else:
        for text in batches.as_lines(trace, batch, ranks, decode, limit=args.limit, color=sys.stdout.isatty()):
            print(text)
    return 0


def _trace(args: argparse.Namespace) -> tuple[Any, int]:
    """The batches of the run, and its data-parallel ranks."""
    from internlm_ds.data.trace import Trace
    from internlm_ds.data.trainset import open_sampler, open_train_set

    config, data_size = load_config(args), 1
    if args.world_size is not None:
        from internlm_ds.runspec import resolve

        data_size = resolve(args.config, overrides=args.overrides, world_size=args.world_size).layout.data
    data = open_train_set(config.data, vocab_size=config.model.vocab_size, log=False)
    weights, ranks = config.internlm_ds.data_weights, {"data_rank": 0, "data_size": data_size}
    sampler = open_sampler(config.data, data.packs, data.files, weights=weights, **ranks)
    return Trace(data, sampler, skip_batches=config.data.skip_batches), data_size


def _decoder(args: argparse.Namespace) -> Any:
    """The decoder of the model that is named, None where none is."""
    from internlm_ds.preprocess.tokenizers import ENVIRONMENT_VARIABLE, find_model

    if args.tokenizer is None and not os.environ.get(ENVIRONMENT_VARIABLE):
        return None
    from internlm_ds.preprocess.decode import open_decoder

    return open_decoder(find_model(args.tokenizer, environ=os.environ))


def _print_json(record: Any) -> None:
    print(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
