"""Packed batches from token files: this loader beside one on json.loads and one on a numpy memory map, in turn.

    python benchmarks/loader.py [--quick] [--json FILE]

A set of a million samples of about 200 tokens is written to a temporary folder (1.4 GB, and 1.6 GB of ids as numbers),
and a meta of ten million rows over the same bin. Every measurement is a process of its own. All loaders give the same
five arrays of each micro-batch: ids, labels, cu_seqlens, positions, types; their order is the same too. Imports are not
counted. Batches per second of processor time stand beside those of the clock: on a busy machine they tell more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pairs

SEQ_LEN, MICRO_NUM, VOCAB_SIZE = 4096, 4, 103_168
DISTINCT = 10_000
Batch = list[tuple[Any, ...]]


def write_set(folder: Path, *, samples: int, times: int) -> None:
    """Write the data.

    `one/en/x.bin` has so many samples; `ten` is the same bin with a meta that names each of them `times` times; `side`
    the same with a side file; `one.ids` all ids as int32.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 0.75, DISTINCT).astype(np.int64), 2, 4000)
    ids = [rng.integers(1, VOCAB_SIZE, length) * rng.choice([1, 1, 1, -1], length) for length in lengths]
    lines = [b'{"tokens": [' + ", ".join(map(str, each.tolist())).encode() + b"]}\n" for each in ids]
    chosen = rng.integers(0, DISTINCT, samples)
    for name in ("one", "ten", "side"):
        (folder / name / "en").mkdir(parents=True)
    bin_path = folder / "one" / "en" / "x.bin"
    with open(bin_path, "wb") as file, open(folder / "one.ids", "wb") as raw:
        for at in range(0, samples, 4096):
            some = chosen[at : at + 4096].tolist()
            file.write(b"".join([lines[number] for number in some]))
            raw.write(np.concatenate([ids[number] for number in some]).astype(np.int32).tobytes())
    sizes = np.array([len(line) for line in lines])[chosen]
    table = np.stack([np.cumsum(sizes) - sizes, lengths[chosen]], axis=1)
    np.save(folder / "meta.npy", table)
    shutil.move(folder / "meta.npy", f"{bin_path}.meta")
    for name in ("ten", "side"):
        os.link(bin_path, folder / name / "en" / "x.bin")
    os.link(f"{bin_path}.meta", folder / "side" / "en" / "x.bin.meta")
    from internlm_ds.data import side_file

    side_file.make(str(folder / "side" / "en" / "x.bin"))
    np.save(folder / "meta.npy", np.tile(table, (times, 1)))
    shutil.move(folder / "meta.npy", folder / "ten" / "en" / "x.bin.meta")


def _order(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, Iterator[list[int]]]:
    """What the two plain loaders share: offsets and ends in the order of packing, starts of rows, pack numbers."""
    table = np.load(f"{folder}/en/x.bin.meta")
    order = np.arange(len(table))
    np.random.RandomState(1024).shuffle(order)
    ends = np.cumsum(table[order, 1])
    packs = np.arange(ends[-1] // SEQ_LEN)
    np.random.RandomState(1024).shuffle(packs)
    starts = (np.cumsum(table[:, 1]) - table[:, 1])[order]
    numbers = (packs[at : at + MICRO_NUM].tolist() for at in range(0, len(packs), MICRO_NUM))
    return table[order, 0], ends, starts, numbers


def json_loader(folder: str, skip: int) -> Iterator[Batch]:
    """Rows by seek and json.loads, lists until the end."""
    offsets, ends, _, batches = _order(folder)
    file = open(f"{folder}/en/x.bin", "rb")  # noqa: SIM115 - as long as the process
    for number, batch in enumerate(batches):
        if number >= skip:
            yield [_json_pack(file, offsets, ends, pack * SEQ_LEN) for pack in batch]


def _json_pack(file: Any, offsets: np.ndarray, ends: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    ids: list[int] = []
    labels: list[int] = []
    borders, positions = [0], []
    sample = int(np.searchsorted(ends, start, side="right"))
    low = start - (int(ends[sample - 1]) if sample else 0)
    while len(ids) < SEQ_LEN:
        file.seek(int(offsets[sample]))
        tokens = json.loads(file.readline())["tokens"]
        piece = tokens[low : low + SEQ_LEN - len(ids)]
        following = tokens[low + 1 : low + 1 + len(piece)]
        ids += [abs(token) for token in piece]
        labels += [token if token > 0 else -100 for token in following] + [-100] * (len(piece) - len(following))
        positions += range(len(piece))
        borders.append(len(ids))
        sample, low = sample + 1, 0
    types = [0] * SEQ_LEN
    return (
        *(np.array(each) for each in (ids, labels)),
        np.array(borders, np.int32),
        *map(np.array, (positions, types)),
    )


def memmap_loader(folder: str, skip: int) -> Iterator[Batch]:
    """Ids of 4 bytes, mapped: no text at all."""
    _, ends, starts, batches = _order(folder)
    ids = np.memmap(Path(folder).parent / "one.ids", dtype=np.int32, mode="r")
    starts = starts % len(ids)
    for number, batch in enumerate(batches):
        if number >= skip:
            yield [_memmap_pack(ids, starts, ends, pack * SEQ_LEN) for pack in batch]


def _memmap_pack(ids: np.ndarray, starts: np.ndarray, ends: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, start + SEQ_LEN)
    lengths = np.diff(ends[first : last + 1], prepend=ends[first - 1] if first else 0)
    rows = zip(starts[first : last + 1].tolist(), lengths.tolist())
    whole = np.concatenate([ids[begin : begin + length] for begin, length in rows]).astype(np.int64)
    skip = start - (int(ends[first - 1]) if first else 0)
    signed, following = whole[skip : skip + SEQ_LEN], np.append(whole[skip + 1 :], -100)[:SEQ_LEN]
    borders = np.minimum(np.concatenate([[0], np.cumsum(lengths) - skip]), SEQ_LEN).astype(np.int32)
    labels = np.where(following > 0, following, -100)
    labels[borders[1:-1] - 1] = -100
    if skip + SEQ_LEN == len(whole):
        labels[-1] = -100
    positions = np.arange(SEQ_LEN) - np.repeat(borders[:-1], np.diff(borders))
    return np.abs(signed), labels, borders, positions, np.zeros(SEQ_LEN, dtype=np.int64)


def our_loader(folder: str, skip: int, *, workers: int = 0, kernel: bool = True) -> Iterator[Batch]:
    """The loader that trains, asked for positions as the model does."""
    from internlm_ds.data import kernels
    from internlm_ds.data.loader import build_train_loader
    from internlm_ds.data.packing import positions_from

    if not kernel:
        kernels.load_in_background = lambda: None
    loader = build_train_loader(_config(folder, workers), data_rank=0, data_size=1)
    if skip:
        loader.load_state_dict({**loader.state_dict(), "batch_count": skip, **_consumed(skip)})
    while True:
        step = loader.next_step()
        yield [
            (tokens.numpy(), labels.numpy(), borders.numpy(), positions_from(borders.numpy()), types.numpy())
            for (tokens, borders), (labels, types) in step.micro_batches
        ]


def _consumed(skip: int) -> dict[str, int]:
    return {"num_consumed_samples_in_epoch": skip * MICRO_NUM}


def _config(folder: str, workers: int) -> Any:
    from internlm_ds.config import schema

    return schema.Config(
        ckpt=schema.CkptConfig(),
        data=schema.DataConfig(
            seq_len=SEQ_LEN, micro_bsz=1, micro_num=MICRO_NUM, num_worker=workers, train_folder=folder
        ),
        grad_scaler=schema.GradScalerConfig(),
        hybrid_zero_optimizer=schema.HybridZeroOptimizerConfig(reduce_bucket_size=1, clip_grad_norm=1.0),
        loss=schema.LossConfig(),
        adam=schema.AdamConfig(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01),
        lr_scheduler=schema.LrSchedulerConfig(total_steps=10),
        beta2_scheduler=schema.Beta2SchedulerConfig(init_beta2=0.95),
        model=schema.ModelConfig(vocab_size=VOCAB_SIZE),
    )


CASES: dict[str, Callable[..., Iterator[Batch]]] = {
    "json.loads": json_loader,
    "numpy memmap": memmap_loader,
    "this, 0 workers": our_loader,
    "this, 4 workers": lambda folder, skip: our_loader(folder, skip, workers=4),
    "this, numpy only": lambda folder, skip: our_loader(folder, skip, kernel=False),
}


def child(case: str, folder: str, batches: int, skip: int) -> dict[str, float]:
    """One measurement: seconds to the first batch, batches a second behind it, memory; what the first batch held."""
    if case.startswith("this"):
        import internlm_ds.data.loader  # noqa: F401 - torch is not counted
    before = _rss_mb()
    started = time.perf_counter()
    loader = CASES[case](folder, skip)
    first = next(loader)
    first_s = time.perf_counter() - started
    rss_mb = _rss_mb()
    if batches and case.startswith("this") and case != "this, numpy only":
        from internlm_ds.data import kernels

        kernels.load()
    for _ in range(min(batches, 20)):
        next(loader)
    started, busy = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    rate, cpu_rate = (batches / max(now, 1e-9) for now in (time.perf_counter() - started, time.process_time() - busy))
    peak = _peak_mb()
    check = sum(int(ids.sum()) + int(labels.sum()) + int(positions.sum()) for ids, labels, _, positions, _ in first)
    figures = {
        "first_s": first_s,
        "rate": rate,
        "cpu_rate": cpu_rate,
        "rss_mb": rss_mb,
        "imports_mb": before,
        "peak_mb": peak,
    }
    return {**figures, "check": float(check)}


def _rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def _peak_mb() -> float:
    """Largest resident memory of this program; what `getrusage` says begins with that of the parent process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM:"))


def measure(case: str, folder: Path, *, batches: int = 0, skip: int = 0) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", case, str(folder), str(batches), str(skip)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def forget(folder: Path) -> None:
    """Take the cached orders away."""
    for path in folder.glob("en/.x.bin.order-*"):
        path.unlink()


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures: rates in turn, then openings."""
    one, ten = folder / "one", folder / "ten"
    cpu_rates: dict[str, list[float]] = {}
    checks: set[float] = set()
    contestants = {case: (one, case) for case in CASES}
    contestants["this, 0 workers, 10 x"] = (ten, "this, 0 workers")
    contestants["this, side file"] = (folder / "side", "this, 0 workers")
    if args.quick:  # the rest takes other ways through the loader, too
        for name in ("this, 4 workers", "this, 0 workers, 10 x"):
            del contestants[name]

    def rated(place: Path, case: str) -> float:
        found = measure(case, place, batches=args.batches if case != "json.loads" else args.batches // 5)
        if place != ten:
            checks.add(found["check"])
        cpu_rates.setdefault(f"{place.name} {case}", []).append(found["cpu_rate"])
        return found["rate"]

    rates = pairs.in_turn(
        {name: lambda place=place, case=case: rated(place, case) for name, (place, case) in contestants.items()},
        rounds=args.rounds,
    )
    assert len(checks) == 1, f"the loaders' first batches differ: {checks}"
    openings = {}
    for name, place, case, skip in (
        ("1 x, json.loads", one, "json.loads", 0),
        ("1 x, first opening", one, "this, 0 workers", 0),
        ("1 x, later", one, "this, 0 workers", 0),
        ("1 x, later, at batch 10 000", one, "this, 0 workers", args.skip),
        ("10 x, first opening", ten, "this, 0 workers", 0),
        ("10 x, later", ten, "this, 0 workers", 0),
        ("10 x, later, at batch 10 000", ten, "this, 0 workers", args.skip),
    ):
        if args.quick and place == ten and "later," not in name:
            continue
        found = []
        for _ in range(args.rounds):
            if "first" in name:
                forget(place)
            found.append(measure(case, place, skip=skip))
        openings[name] = {key: float(np.median([each[key] for each in found])) for key in found[0]}
    in_cpu = {name: cpu_rates[f"{place.name} {case}"] for name, (place, case) in contestants.items()}
    return {"rates": rates, "cpu_rates": in_cpu, "openings": openings}


def shown(report: dict[str, Any]) -> str:
    """Both tables."""
    rates, in_cpu = report["rates"], report["cpu_rates"]
    tokens = SEQ_LEN * MICRO_NUM / 1e6
    first = pairs.table(
        ["loader", "batches/s", "Mtokens/s", "x json.loads", "x this, 0 workers", "x json.loads, CPU"],
        [
            [name, float(np.median(each)), float(np.median(each)) * tokens]
            + [str(pairs.ratio(each, rates[over])) for over in ("json.loads", "this, 0 workers")]
            + [str(pairs.ratio(in_cpu[name], in_cpu["json.loads"]))]
            for name, each in rates.items()
        ],
    )
    second = pairs.table(
        ["opening", "first batch s", "RSS MB", "of it imports", "peak MB"],
        [
            [name, *(each[key] for key in ("first_s", "rss_mb", "imports_mb", "peak_mb"))]
            for name, each in report["openings"].items()
        ],
    )
    return f"{first}\n\n{second}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--skip", type=int, default=10_000, help="batch to resume at")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write the data (default: the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="50 000 samples, one round: does it run?")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, folder, batches, skip = args.child
        print(json.dumps(child(case, folder, int(batches), int(skip))))
        return
    if args.quick:
        args.samples, args.batches, args.skip, args.rounds = 50_000, 200, 100, 1
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        write_set(Path(name), samples=args.samples, times=10)
        report = {**pairs.facts(args, packages=("numpy", "numba", "torch")), **run(Path(name), args)}
    print(pairs.headline(report), shown(report), sep="\n\n")
    pairs.write_json(report, args.json)


if __name__ == "__main__":
    main()
