"""How fast `internlm-ds data check` reads a bin: the compiled scan beside `json.loads`, rounds in turn.

    python benchmarks/scan_bins.py --megabytes 400 --rounds 5

The bin holds random samples of about 200 tokens with ids below 103168, in the page cache. `scan` is the reading and
measuring of all lines alone, `check` the whole command as a process, start-up and meta included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pairs import facts, headline, in_turn, process, ratio, seconds, table, write_json

from internlm_ds.data.binmeta import Writer
from internlm_ds.data.doctor.scan import scan_bins

VOCAB_SIZE = 103_168


def make_bin(path: Path, *, num_bytes: int) -> None:
    """Samples of 20 to 379 tokens until there are so many bytes."""
    rng = np.random.default_rng(0)
    with Writer(path, overwrite=True) as writer:
        while writer.num_bytes < num_bytes:
            for length in rng.integers(20, 380, size=1000):
                writer.write(rng.integers(1, VOCAB_SIZE, size=length).tolist())


def json_loop(path: Path) -> int:
    """What a script of a few lines does: parse every line, look at every id."""
    largest = 0
    with open(path, "rb") as file:
        for line in file:
            largest = max(largest, *json.loads(line)["tokens"])
    return largest


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--megabytes", type=int, default=400, help="size of the bin (default: 400)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--quick", action="store_true", help="20 MB, one round, to see that it works")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    args = parser.parse_args(argv)
    if args.quick:
        args.megabytes, args.rounds = 20, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "en" / "a.bin"
        make_bin(path, num_bytes=args.megabytes * 1_000_000)
        size = os.path.getsize(path)
        list(scan_bins([str(path)], engine="compiled"))  # compiled, and in the page cache

        def rate(work) -> float:
            return size / seconds(work) / 1e9

        def scanned(threads: int) -> float:
            return rate(lambda: list(scan_bins([str(path)], workers=threads, engine="compiled")))

        check = [sys.executable, "-m", "internlm_ds.cli.main", "data", "check", str(path), "--workers"]
        contestants = {"json.loads": lambda: rate(lambda: json_loop(path))}
        for threads in args.threads:
            contestants[f"scan, {threads} threads"] = lambda threads=threads: scanned(threads)
            contestants[f"check, {threads} threads"] = lambda threads=threads: (
                size / process([*check, str(threads)]).seconds / 1e9
            )
        figures = in_turn(contestants, rounds=args.rounds)
    report = {
        **facts(args, packages=["numpy", "numba"]),
        "bytes": size,
        "GB/s": figures,
        "over json.loads": {name: ratio(rates, figures["json.loads"]) for name, rates in figures.items()},
    }
    print(headline(report))
    rows = [
        [name, sorted(rates)[len(rates) // 2], str(report["over json.loads"][name])] for name, rates in figures.items()
    ]
    print(table(["contestant", "GB/s", "over json.loads"], rows))
    write_json(report, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
