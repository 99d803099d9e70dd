"""`internlm-ds inspect-checkpoint PATH`: the door to `checkpoint.inspection`."""

from __future__ import annotations

import argparse
import json

from internlm_ds.checkpoint import place
from internlm_ds.checkpoint.inspection import inspect, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder, or a save folder with several")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of text")
    parser.add_argument("--verify", action="store_true", help="read all files and compare them with their checksums")


def run(args: argparse.Namespace) -> int:
    found = inspect(place.localized(args.path), verify=args.verify)
    if args.json:
        print(json.dumps([one.to_json() for one in found], indent=1, allow_nan=False))
    else:
        print("\n\n".join(map(render, found)))
    return 1 if any(one.problems for one in found) else 0
