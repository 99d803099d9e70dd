#!/usr/bin/env python
"""Saving, saving in the background, loading and converting, beside what people use otherwise.

`python benchmarks/checkpoint.py` makes a state of 200 fp32 tensors (1 GB) and measures, in turn within each round:

* save: until the bytes are on the disk. Ours with checksums, manifest, rename; safetensors and torch.save with fsync.
* async: how long training waits, the buffer being warm. Ours; `torch.distributed.checkpoint.async_save`.
* load: from the disk, as far as this system lets its cache be dropped. Ours with all checksums compared, and without;
  safetensors; torch.load.
* convert: largest resident memory of `convert-checkpoint` for a 2 GB checkpoint above that for a tiny one.

On a shared machine only the ratios within one run count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pairs
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internlm_ds.arch import internlm as blueprint
from internlm_ds.checkpoint.agree import Solo
from internlm_ds.checkpoint.background import BackgroundSaver
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.formats.native import Weight
from internlm_ds.config.schema import ModelConfig
from internlm_ds.layout.ranks import Layout

TENSORS = 200
MB = 10**6
PACKAGES = ("internlm-ds", "torch", "safetensors")
State = Mapping[str, torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.mb, args.rounds, args.convert_mb = 64, 2, 64
    torch.set_num_threads(1)
    report: dict[str, Any] = pairs.facts(args, packages=PACKAGES)
    print(pairs.headline(report))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        state = {f"layer{i}.weight": torch.randn(args.mb * MB // TENSORS // 4) for i in range(TENSORS)}
        for part in args.parts.split(","):
            report[part] = _PARTS[part](state, Path(folder) / part, args)
            _show(part, report[part])
    pairs.write_json(report, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--mb", type=int, default=1000, help="size of the state in MB (default %(default)s)")
    add("--convert-mb", type=int, default=2000, help="size of the converted checkpoint (default %(default)s)")
    add("--rounds", type=int, default=5, help="of all contestants (default %(default)s)")
    add("--parts", default=",".join(_PARTS), help="some of these (default %(default)s)")
    add("--folder", help="where to write; a disk, not memory (default: the system's temporary folder)")
    add("--quick", action="store_true", help="64 MB, two rounds: does it run?")
    add("--json", metavar="FILE", help="also write the figures here")
    return parser


# ---- contestants ----------------------------------------------------------------------------------


def save_native(state: State, folder: Path, **owned: Any) -> None:
    arguments = {"weights": state.items(), "arch": None, "train_state": {"step_count": 1}, **owned}
    native.save(folder, config_text="", layout=Layout(), dtype="float32", **arguments)


def save_safetensors(state: State, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(dict(state), folder / "model.safetensors")
    _to_disk(folder / "model.safetensors")


def save_torch(state: State, folder: Path) -> None:
    folder.mkdir()
    torch.save(dict(state), folder / "model.pt")
    _to_disk(folder / "model.pt")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- parts ----------------------------------------------------------------------------------------


def measure_saving(state: State, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """GB/s of each, and how many times the others'."""

    def rate(save: Callable[[State, Path], None]) -> float:
        _empty(folder)
        return args.mb / 1000 / pairs.seconds(lambda: save(state, folder / "1"))

    contestants = {"native": save_native, "safetensors + fsync": save_safetensors, "torch.save + fsync": save_torch}
    figures = pairs.in_turn({name: partial(rate, save) for name, save in contestants.items()}, rounds=args.rounds)
    return _ratios(figures, over="safetensors + fsync")


def measure_waiting(state: State, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds until the caller goes on."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    _empty(folder)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder.parent / "store"), 1), rank=0, world_size=1)
    saver = BackgroundSaver(comm=Solo(), thread_comm=Solo())
    saver.buffer.warm(args.mb * MB + 64 * TENSORS)

    def ours() -> float:
        _empty(folder)
        weights = [Weight(*item) for item in state.items()]
        save = partial(save_native, state, folder / "1")
        waited = pairs.seconds(lambda: saver.start(save, weights=weights, fragments=[]))
        saver.wait()
        return waited

    def theirs() -> float:
        _empty(folder)
        futures = []
        waited = pairs.seconds(lambda: futures.append(dcp.async_save(dict(state), checkpoint_id=str(folder / "1"))))
        futures[0].result()
        return waited

    figures = pairs.in_turn({"native": ours, "dcp.async_save": theirs}, rounds=args.rounds)
    dist.destroy_process_group()
    return _ratios(figures, over="dcp.async_save")


def measure_loading(state: State, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """GB/s of each, every tensor read into memory."""
    from safetensors.torch import load_file

    _empty(folder)
    save_native(state, folder / "native")
    save_safetensors(state, folder / "safetensors")
    save_torch(state, folder / "torch")
    del state

    def ours(*, verify: bool) -> list[torch.Tensor]:
        return list(native.open(folder / "native", verify=verify).weights.values())

    contestants = {
        "native, checksums compared": partial(ours, verify=True),
        "native, not compared": partial(ours, verify=False),
        "safetensors": lambda: load_file(folder / "safetensors" / "model.safetensors"),
        "torch.load": lambda: torch.load(folder / "torch" / "model.pt", weights_only=True),
    }

    def rate(load: Callable[[], Any]) -> float:
        for path in folder.rglob("*.*"):
            _drop_cache(path)
        return args.mb / 1000 / pairs.seconds(load)

    figures = pairs.in_turn({name: partial(rate, load) for name, load in contestants.items()}, rounds=args.rounds)
    return _ratios(figures, over="torch.load")


def measure_converting(state: State, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """MB that the larger one takes above a tiny one, in a process of its own."""
    _empty(folder)
    peaks = {}
    for name, size in (("tiny", 1), ("large", args.convert_mb)):
        model = _model_of(size * MB)
        arch = blueprint.build(model)
        save_native(
            {},
            folder / name,
            weights=((spec.name, torch.zeros(spec.shape)) for spec in arch.iter_params()),
            arch=arch,
            model=model,
        )
        peaks[name] = _peak_mb(["convert-checkpoint", str(folder / name), str(folder / f"{name}-hf"), "--to", "hf"])
        largest = max(torch.Size(spec.shape).numel() * 4 for spec in arch.iter_params())
    return {"peak_mb": peaks, "extra_mb": peaks["large"] - peaks["tiny"], "largest_tensor_mb": largest / MB}


def _peak_mb(arguments: Sequence[str]) -> float:
    """Largest resident memory of a command; by way of a small process, because a child begins with its parent's."""
    command = [sys.executable, "-m", "internlm_ds.cli.main", *arguments]
    program = (
        f"import resource, subprocess\nsubprocess.run({command!r}, check=True, capture_output=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environ)
    return int(done.stdout) * 1024 / MB


def _model_of(size: int) -> ModelConfig:
    """A model of about so many bytes in fp32."""
    hidden = 64 if size < 50 * MB else 1024
    layer = 4 * hidden**2 + 3 * hidden * int(hidden * 8 / 3)
    layers = max(1, (size // 4 - 2 * 1024 * hidden) // layer)
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        vocab_size=1024,
        mlp_ratio=8 / 3,
        dtype="float32",
    )


_PARTS = {
    "save": measure_saving,
    "async": measure_waiting,
    "load": measure_loading,
    "convert": measure_converting,
}


# ---- around it ------------------------------------------------------------------------------------


def _ratios(figures: dict[str, list[float]], *, over: str) -> dict[str, Any]:
    return {
        "figures": figures,
        "over": over,
        "ratios": {name: pairs.ratio(each, figures[over]) for name, each in figures.items()},
    }


def _empty(folder: Path) -> None:
    """Nothing from before, neither files nor what the system still has to write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()


def _drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _show(part: str, found: dict[str, Any]) -> None:
    if part == "convert":
        print(f"\nconvert: {found['extra_mb']:.0f} MB more than a tiny checkpoint takes; its largest tensor has "
              f"{found['largest_tensor_mb']:.0f} MB")  # fmt: skip
        return
    unit = "seconds waited" if part == "async" else "GB/s"
    rows = [
        (name, *(pairs.statistics.median(each), min(each), max(each)), found["ratios"][name])
        for name, each in found["figures"].items()
    ]
    head = [f"{part} ({unit})", "median", "min", "max", f"of {found['over']}"]
    print(f"\n{pairs.table(head, rows)}")


if __name__ == "__main__":
    sys.exit(main())
