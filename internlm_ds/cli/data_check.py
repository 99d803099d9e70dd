"""`internlm-ds data check`: options and printing; the examination is `data.doctor`'s."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from internlm_ds.cli.data_common import (
    add_config_options,
    add_workers_option,
    data_paths,
    load_config,
    shown_progress,
)


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("paths", nargs="*", metavar="PATH", help="bin files, or folders of a data set")
    add_config_options(parser, "take folders, vocabulary and min_length from it")
    about = "ids must be below N (default: the configuration's, the tokenizer's, or what is noted beside each bin)"
    parser.add_argument("--vocab-size", type=int, metavar="N", help=about)
    about = "the model that the bins should have been made with; finds JSON syntax in any tokenizer's ids"
    parser.add_argument("--tokenizer", metavar="MODEL", help=about)
    parser.add_argument("--min-length", type=int, metavar="N", help="every sample shall have N tokens")
    about = "hash the texts that the notes beside the bins name, and compare"
    parser.add_argument("--sources", action="store_true", help=about)
    add_workers_option(parser)
    parser.add_argument("--strict", action="store_true", help="warnings end with exit code 1, too")
    parser.add_argument("--json", action="store_true", help="every finding, as JSON")


def run(args: argparse.Namespace) -> int:
    """Examine and print.

    Returns:
        1 if there is an error, or a warning with `--strict`; else 0.
    Raises:
        ConfigError, DataFormatError, TokenizerError: There is nothing to examine, or nothing to hold it against.
    """
    from internlm_ds.data.doctor import checks, findings, folders, report, scan

    config = load_config(args)
    expected = _expected(args, config)
    owners: dict[str, str] = {}
    found = []
    for path in data_paths(args.paths, config):
        bins = folders.bins_below(path)
        typed = config is None or path != config.data.valid_folder
        found += folders.check_folder(path, bins, typed=typed) if bins != [path] else []
        owners.update((one, path) for one in bins)
    bins = list(owners)
    examined = []
    with shown_progress(bins) as done:
        for one, lines in zip(bins, scan.scan_bins(bins, workers=args.workers, done=done)):
            own = replace(expected, min_length=_min_length(args, config, one, owners[one]))
            examined.append(checks.examine(one, lines, own))
            found += examined[-1].findings
    found += checks.compare_bins(examined)
    if args.json:
        print(json.dumps(report.as_json(found, examined), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(report.as_text(found, examined))
    return int(any(args.strict or finding.severity == findings.ERROR for finding in found))


def _expected(args: argparse.Namespace, config: Any) -> Any:
    """What the options say, for all bins alike."""
    from internlm_ds.data.doctor.checks import Expected
    from internlm_ds.data.doctor.notes import TokenizerFacts

    vocab_size, origin, facts, decode = args.vocab_size, "--vocab-size", None, None
    if vocab_size is None and config is not None:
        vocab_size, origin = config.model.vocab_size, "model.vocab_size"
    if args.tokenizer is not None:
        from internlm_ds.preprocess.decode import open_decoder
        from internlm_ds.preprocess.tokenizers import find_model, open_tokenizer

        tokenizer = open_tokenizer(find_model(args.tokenizer, environ={}))
        facts = TokenizerFacts(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
        decode = open_decoder(tokenizer.path).text
        if vocab_size is None:
            vocab_size, origin = tokenizer.vocab_size, f"the tokenizer {tokenizer.name}"
    return Expected(
        vocab_size=vocab_size,
        vocab_origin=origin,
        min_length_wanted=args.min_length is not None,
        tokenizer=facts,
        decode=decode,
        hash_sources=args.sources,
    )


def _min_length(args: argparse.Namespace, config: Any, path: str, folder: str) -> int:
    """Fewest tokens of a sample of this bin."""
    if args.min_length is not None or config is None:
        return args.min_length or 0
    import os

    from internlm_ds.data.catalog import min_length_of
    from internlm_ds.data.validation import VALIDATION_MIN_LENGTH

    if config.data.valid_folder and os.path.abspath(path).startswith(
        os.path.abspath(config.data.valid_folder) + os.sep
    ):
        return VALIDATION_MIN_LENGTH
    name = os.path.relpath(path, config.data.train_folder or folder)
    return min_length_of(path, name, default=config.data.min_length, by_key=config.data.min_length_dict)
