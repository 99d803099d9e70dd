"""What the tasks of `internlm-ds data` share: where data lies, progress, a configuration's words."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from internlm_ds.errors import ConfigError, DataFormatError


def add_config_options(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--config", metavar="CONFIG", help=about)
    about = "replace a value of the configuration: a dotted key, or a constant of the file; repeatable"
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=about)


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    about = "threads (default: one for each processor)"
    parser.add_argument("--workers", type=_positive, default=len(os.sched_getaffinity(0)), metavar="N", help=about)


def load_config(args: argparse.Namespace) -> Any:
    """The configuration that `--config` names, None without it.

    Raises:
        ConfigError: It cannot be used.
    """
    if args.config is None:
        return None
    from internlm_ds.config import load

    loaded = load(args.config, args.overrides)
    if loaded.problems:
        raise ConfigError(loaded.problems, path=loaded.path)
    return loaded.config


def data_paths(paths: Sequence[str], config: Any) -> list[str]:
    """What was named, else the folders of the configuration.

    Raises:
        DataFormatError: Nothing was named.
    """
    if paths:
        return list(paths)
    found = [path for path in (config.data.train_folder, config.data.valid_folder) if path] if config else []
    if not found:
        what = "the configuration names no folder of data" if config else "nothing to look at"
        raise DataFormatError(f"{what}; name bin files or folders, or a --config with data.train_folder")
    return found


@contextmanager
def shown_progress(paths: Sequence[str]) -> Iterator[Callable[[Any], None]]:
    """A function to call with each block that was scanned; shows rates, share done and time left on stderr."""
    from internlm_ds.preprocess.progress import Progress

    total = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    progress, done, tokens = Progress(total, stream=sys.stderr), 0, 0

    def add(block: Any) -> None:
        nonlocal done, tokens
        done, tokens = done + block.size, tokens + block.num_tokens
        progress.update(done, tokens=tokens)

    try:
        yield add
    finally:
        progress.finish()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
