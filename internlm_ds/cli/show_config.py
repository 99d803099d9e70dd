"""`internlm-ds show-config`: every value of a configuration with its origin. Reading it is `config`'s."""

from __future__ import annotations

import argparse
import json
import sys

from internlm_ds.config import load
from internlm_ds.config.render import as_json, table
from internlm_ds.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="an InternLM Python configuration")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="replace a value: a dotted key, or a constant of the file; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list of {key, value, origin, file, line, note}")


def run(args: argparse.Namespace) -> int:
    """Print the values; warnings go to stderr.

    Raises:
        ConfigError: The file cannot be used; lists all its problems.
    """
    loaded = load(args.config, args.overrides)
    if loaded.problems:
        raise ConfigError(loaded.problems, path=loaded.path)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        rows = [as_json(leaf, path=loaded.path) for leaf in loaded.leaves]
        print(json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(table(loaded.leaves, path=loaded.path))
    return 0
