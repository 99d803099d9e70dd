"""`internlm-ds data stats`: options and printing; the numbers are `data.doctor`'s."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
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
    add_config_options(parser, "say what packing makes of data.train_folder; without PATH, count its folders")
    about = "ranks of the run, to say how many steps an epoch has"
    parser.add_argument("--world-size", type=int, metavar="N", help=about)
    add_workers_option(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draw tokens by type and lengths (extra: plot)")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON, file by file as well")


def run(args: argparse.Namespace) -> int:
    """Count and print.

    Raises:
        ConfigError, LayoutError, DataFormatError, MissingExtraError: There is nothing to count, or it cannot be shown.
    """
    from internlm_ds.data.doctor import scan, stats, stats_report
    from internlm_ds.data.doctor.folders import bins_below, type_below

    config = load_config(args)
    types_of: dict[str, str] = {}
    for path in data_paths(args.paths, config):
        types_of.update((one, type_below(path, one)) for one in bins_below(path))
    scanned = {}
    with shown_progress(list(types_of)) as done:
        for one, lines in zip(types_of, scan.scan_bins(list(types_of), workers=args.workers, done=done)):
            scanned[one] = _counted(lines)
    names = sorted(set(types_of.values()))
    types = {name: stats.holdings([scanned[one] for one in types_of if types_of[one] == name]) for name in names}
    total = stats.holdings(list(scanned.values()))
    packing, steps, mixture = _packing(args, config) if config is not None else (None, None, [])
    if args.plot:
        stats_report.draw(args.plot, types, total)
    if args.json:
        record: dict[str, Any] = {
            "total": total.as_json(),
            "types": {name: one.as_json() for name, one in types.items()},
        }
        record["files"] = {one: stats.holdings([lines]).as_json() for one, lines in scanned.items()}
        if packing is not None:
            record["packing"] = {name: one.as_json() for name, one in packing.items()}
            record["steps_per_epoch"] = steps
            record["mixture"] = [asdict(one) for one in mixture]
        print(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        print(stats_report.as_text(types, total, packing))
        if steps is not None:
            print(f"{steps:,} steps an epoch with --world-size {args.world_size}")
        for one in mixture:
            ranks = "one data-parallel rank" if args.world_size is None else f"--world-size {args.world_size}"
            print(f"mixture over {config.data.total_steps:,} steps with {ranks}: {one}")
    return 0


def _counted(lines: Any) -> Any:
    if isinstance(lines, OSError):
        from internlm_ds.errors import DataFormatError

        raise DataFormatError(lines.strerror or str(lines), path=lines.filename)
    return lines


def _packing(args: argparse.Namespace, config: Any) -> tuple[Mapping[str, Any], int | None, list[Any]]:
    """What the packers of the configuration make of its training folder, by type and in all; steps of an epoch; what
    each source of a mixture gives.
    """
    from internlm_ds.data.doctor.stats import NOTHING_PACKED, packing_of
    from internlm_ds.data.trainset import open_sampler, open_train_set
    from internlm_ds.data.weighted import WeightedSampler, facts_of
    from internlm_ds.layout.batch import BatchPlan

    train_set = open_train_set(config.data, vocab_size=config.model.vocab_size, log=False)
    found: dict[str, Any] = {}
    for number, part in enumerate(train_set.packs.parts):
        name = train_set.files[number].type_name if train_set.files else "synthetic"
        found[name] = found.get(name, NOTHING_PACKED) + packing_of(part)
    found["all"] = sum(found.values(), NOTHING_PACKED)
    weights, data_size = config.internlm_ds.data_weights, 1
    if args.world_size is None and weights is None:
        return found, None, []
    if args.world_size is not None:
        from internlm_ds.runspec import resolve

        data_size = resolve(args.config, overrides=args.overrides, world_size=args.world_size).layout.data
    ranks = {"data_rank": 0, "data_size": data_size}
    sampler = open_sampler(config.data, train_set.packs, train_set.files, weights=weights, **ranks)
    mixture = []
    if isinstance(sampler, WeightedSampler):
        batch = BatchPlan.from_config(config.data, data_size=data_size)
        mixture = facts_of(sampler.mixture, batch=batch, steps=config.data.total_steps)
    return found, len(sampler) if args.world_size is not None else None, mixture
