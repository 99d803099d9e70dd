"""`internlm-ds data side-file`: write the ids of bins as numbers beside them; the files are `data.side_file`'s."""

from __future__ import annotations

import argparse

from internlm_ds.cli.preprocess_common import FileErrors


def add_arguments(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="bin files, or folders of a data set")


def run(args: argparse.Namespace) -> int:
    """Write the side file of each bin, but where one that fits is there.

    Raises:
        DataFormatError: A bin is damaged, or a folder cannot be written.
    """
    from internlm_ds.data import side_file
    from internlm_ds.data.doctor import folders

    with FileErrors():
        for path in [path for each in args.paths for path in folders.bins_below(each)]:
            if side_file.find(path) is not None:
                print(f"{path}{side_file.SUFFIX}: there already")
            else:
                print(f"{path}{side_file.SUFFIX}: {side_file.make(path)} ids")
    return 0
