"""`internlm-ds data repair`: options and printing; the copies are `data.doctor`'s."""

from __future__ import annotations

import argparse

from internlm_ds.cli.data_common import add_workers_option, shown_progress
from internlm_ds.cli.preprocess_common import FileErrors, warn
from internlm_ds.errors import DataFormatError


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    from internlm_ds.data.doctor.repair import DROPPABLE

    parser.add_argument("paths", nargs="+", metavar="PATH", help="bin files, or folders of a data set")
    about = "the copy of one bin, or a folder for those of several, named as they are below PATH"
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=about)
    about = "leave such samples out, too; repeatable"
    parser.add_argument("--drop", action="append", default=[], choices=DROPPABLE, help=about)
    about = "ids must be below N, for --drop id-range (default: what is noted beside each bin)"
    parser.add_argument("--vocab-size", type=int, metavar="N", help=about)
    parser.add_argument("--min-length", type=int, default=0, metavar="N", help="fewest tokens, for --drop short")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    add_workers_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the copies and say what was done, and what is still wrong with them.

    Returns:
        1 if an error is left that no copy mends, else 0.
    Raises:
        DataFormatError: A bin cannot be read, or an output exists or cannot be written.
    """
    from internlm_ds.data.catalog import noted_ids
    from internlm_ds.data.doctor import checks, folders, repair, report, scan

    if "short" in args.drop and args.min_length < 1:
        raise DataFormatError("--drop short leaves out samples of fewer than --min-length N tokens; give N")
    below = [folders.bins_below(path) for path in args.paths]
    pairs = repair.outputs_of(args.paths, below, args.output)
    _refuse_in_place(pairs)
    bins = [one for one, _ in pairs]
    with shown_progress(bins) as done, FileErrors():
        scanned = scan.scan_bins(bins, workers=args.workers, done=done)
        for (one, output), lines in zip(pairs, scanned):
            if isinstance(lines, OSError):
                raise lines
            size = args.vocab_size if args.vocab_size is not None else noted_ids(one)[1]
            mended = repair.repair(
                one,
                output,
                lines,
                drop=args.drop,
                vocab_size=size,
                min_length=args.min_length,
                overwrite=args.overwrite,
            )
            what = "; ".join(mended.did) or "nothing was wrong with lines and meta, copied as it is"
            print(f"{one} -> {output}: {what}. {mended.samples} samples, {mended.tokens} tokens")
    outputs = [output for _, output in pairs]
    expected = checks.Expected(vocab_size=args.vocab_size, vocab_origin="--vocab-size")
    examined = [
        checks.examine(output, lines, expected)
        for output, lines in zip(outputs, scan.scan_bins(outputs, workers=args.workers))
    ]
    left = [finding for one in examined for finding in one.findings]
    if left:
        warn("this is left, a copy does not mend it:")
        print(report.as_text(left, examined))
    return int(not all(one.is_sound for one in examined))


def _refuse_in_place(pairs: list[tuple[str, str]]) -> None:
    import os

    seen: dict[str, str] = {}
    for one, output in pairs:
        if os.path.exists(output) and os.path.samefile(one, output):
            raise DataFormatError("a bin is never repaired in place; give -o another file or folder", path=output)
        if (other := seen.setdefault(os.path.abspath(output), one)) != one:
            raise DataFormatError(f"{other} and {one} would both become this file; repair them one by one", path=output)
