"""`internlm-ds data check`: options and printing; the examination is `data.doctor`'s."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="bin files, or folders of a data set")
    about = "ids must be below N (default: what preprocessing noted beside each bin)"
    parser.add_argument("--vocab-size", type=int, metavar="N", help=about)
    parser.add_argument("--json", action="store_true", help="every finding, as JSON")


def run(args: argparse.Namespace) -> int:
    """Examine and print.

    Returns:
        1 if there is an error, else 0.
    Raises:
        DataFormatError: There is no bin to examine.
    """
    from internlm_ds.data.catalog import noted_ids
    from internlm_ds.data.doctor import checks, findings, folders, report

    examined, found = [], []
    for path in args.paths:
        bins = folders.bins_below(path)
        found += folders.check_names(path, bins) if bins != [path] else []
        for one in bins:
            vocab_size = args.vocab_size if args.vocab_size is not None else noted_ids(one)[1]
            examined.append(checks.examine(one, vocab_size=vocab_size))
            found += examined[-1].findings
    if args.json:
        print(json.dumps(report.as_json(found, examined), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(report.as_text(found, examined))
    return int(any(finding.severity == findings.ERROR for finding in found))
