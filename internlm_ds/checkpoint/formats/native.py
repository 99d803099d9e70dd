"""The native format: one folder per checkpoint, independent of the layout that wrote it.

Weights lie by logical name in safetensors files, one set per rank that owns weights: whole, or as the shards that
tensor ranks held, `NAME@tensor1`, each described in the manifest. Optimizer state lies in fragments: 1-D slices of
what was flattened, a whole parameter or a shard, keyed `exp_avg/NAME@START`, as each rank happened to own them. A
reader asks for a whole parameter, for any shard of it or for any slice, and gets it from what is there; fragments of
a run that keeps its states in bf16 are bf16, and reach a reader as fp32. Beside them:
`train_state.json`, one random state per rank, `config.py`, and `manifest.json`, written last. Everything is written
into a temporary folder and appears under its name by one rename, or not at all.

When to save and what to load is the manager's; shapes of parameters are the blueprint's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import diskfile, tensorfile, train_state
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint.agree import Comm, Solo, collect, on_first_rank
from internlm_ds.checkpoint.completeness import check_fragments, check_parameters, check_visible
from internlm_ds.checkpoint.diskfile import FileRecord, Flush
from internlm_ds.checkpoint.formats.native_reader import (
    CONFIG,
    EXP_AVG,
    EXP_AVG_SQ,
    KINDS,
    MASTER,
    TRAIN_STATE,
    NativeCheckpoint,
    open,
    random_file,
)
from internlm_ds.checkpoint.manifest import Manifest, StoredFragment, StoredParameter
from internlm_ds.checkpoint.storage.base import Storage
from internlm_ds.checkpoint.storage.local import LocalStorage
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import Shard

__all__ = [
    "CONFIG",
    "EXP_AVG",
    "EXP_AVG_SQ",
    "KINDS",
    "MASTER",
    "TRAIN_STATE",
    "Fragment",
    "NativeCheckpoint",
    "Weight",
    "open",
    "save",
]


Entry = TypeVar("Entry", StoredParameter, StoredFragment)


class Weight(NamedTuple):
    """What a rank writes of a parameter: all of it, or its shard."""

    name: str
    tensor: torch.Tensor
    shard: Shard | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        shape = tuple(self.tensor.shape)
        return shape if self.shard is None else self.shard.whole_shape(shape)


@dataclass(frozen=True)
class Fragment:
    """A piece of optimizer state: elements `[start, start + numel)` of a flattened parameter.

    Attributes:
        kind: `master` (the weights that are updated), `exp_avg` or `exp_avg_sq`.
        tensor: fp32 `(numel,)`, or bf16 from a run that keeps it so.
        shard: What was flattened; None: the whole parameter.
    """

    name: str
    kind: str
    start: int
    tensor: torch.Tensor
    shard: Shard | None = None


@dataclass(frozen=True)
class _RankReport:
    """What one rank wrote, sent to rank 0."""

    files: dict[str, FileRecord]
    parameters: list[StoredParameter]
    fragments: list[StoredFragment]
    has_random_state: bool


def save(
    folder: str | Path,
    *,
    comm: Comm | None = None,
    weights: Iterable[Weight | tuple[str, torch.Tensor]],
    fragments: Iterable[Fragment] = (),
    rng_state: dict[str, Any] | None = None,
    train_state: dict[str, Any],
    config_text: str,
    layout: Layout,
    arch: ModelArch | None,
    dtype: str | torch.dtype,
    step: int | None = None,
    model: ModelConfig | None = None,
    model_type: str = "INTERNLM",
    storage: Storage | None = None,
) -> Path:
    """Write a checkpoint; called by all ranks together, with what each of them owns.

    Args:
        folder: Final place, `<save folder>/<step>` or `<save folder>/snapshot/0`; what is there is replaced at once.
        weights: `(logical name, whole tensor)`, or `(logical name, shard, its description)`; over all ranks of the job
            each parameter is there once.
        fragments: This rank's optimizer state; over all ranks they cover every parameter once, or there are none.
        rng_state: Random states of this rank: nested dicts, lists, tuples of plain values, numpy arrays and tensors.
        train_state: Plain values (rank 0's are written).
        arch: Blueprint that the weights are checked against; None for a registered model type.
        model, model_type: The model's settings, kept as data so that an export need not run `config.py`.
        step: Successful updates; by default `train_state["step_count"]`, else the number that `folder` is named.
    Returns:
        The folder.
    Raises:
        CheckpointError: On all ranks, if anything failed on any; nothing is published then.
    """
    final, comm, storage = Path(folder), comm or Solo(), storage or LocalStorage()
    temporary = on_first_rank(comm, lambda: storage.make_temporary(final), doing=f"saving {final}")
    try:

        def write_own() -> _RankReport:
            temporary.mkdir(parents=True, exist_ok=True)  # a host of its own may not share rank 0's disk
            report = _write_rank(
                temporary,
                rank=comm.rank,
                weights=weights,
                fragments=fragments,
                rng_state=rng_state,
                texts=_texts(train_state, config_text) if comm.rank == 0 else {},
            )
            storage.deliver(temporary, final, report.files)
            return report

        reports = collect(comm, write_own, doing=f"saving {final}")

        def finish() -> None:
            number = train_state.get("step_count", step) if step is None else step
            head = Manifest(
                step=int(final.name) if number is None else number,
                created=time.time(),
                versions=_versions(),
                layout=asdict(layout),
                dtype=_dtype_name(dtype),
                model=_describe_model(arch, model, model_type=model_type),
                parameters=(),
                fragments=(),
                random_states=0,
                files={},
            )
            _finish(temporary, reports, head=head, arch=arch, arrived=lambda: storage.arrived(temporary, final))
            storage.publish(temporary, final)

        on_first_rank(comm, finish, doing=f"saving {final}")
    except CheckpointError:
        if comm.rank == 0:
            storage.remove(temporary)
        raise
    return final


def _write_rank(
    folder: Path,
    *,
    rank: int,
    weights: Iterable[Weight | tuple[str, torch.Tensor]],
    fragments: Iterable[Fragment],
    rng_state: dict[str, Any] | None,
    texts: Mapping[str, str],
) -> _RankReport:
    with Flush() as flush:
        out = _RankFiles(folder, rank=rank, flush=flush)
        for name, text in texts.items():
            out.write_text(name, text)
        if rng_state is not None:
            out.write_random_state(rng_state)
        parameters, stored = out.write_weights(weights), out.write_fragments(fragments)
    return _RankReport(out.files, parameters, stored, has_random_state=rng_state is not None)


class _RankFiles:
    """What one rank writes, file after file, and their records."""

    def __init__(self, folder: Path, *, rank: int, flush: Flush):
        self._folder, self._rank, self._flush = folder, rank, flush
        self.files: dict[str, FileRecord] = {}

    def write_text(self, name: str, text: str) -> None:
        self.files[name] = diskfile.write_bytes(self._folder / name, text.encode(), flush=self._flush)

    def write_random_state(self, state: dict[str, Any]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        text = train_state.dumps(state, tensors)
        name = random_file(self._rank)
        self.write_text(f"{name}.json", text)
        if tensors:
            self._write(f"{name}.safetensors", tensors)

    def write_weights(self, weights: Iterable[Weight | tuple[str, torch.Tensor]]) -> list[StoredParameter]:
        entries = (
            (StoredParameter(w.name, w.shape, _dtype_name(w.tensor.dtype), "", w.shard), w.tensor)
            for w in (Weight(*item) for item in weights)
        )
        return self._write_entries("weights", entries)

    def write_fragments(self, fragments: Iterable[Fragment]) -> list[StoredFragment]:
        entries = ((_stored(f, file=""), f.tensor) for f in fragments if f.tensor.numel())
        return self._write_entries("optimizer", entries)

    def _write_entries(self, what: str, entries: Iterable[tuple[Entry, torch.Tensor]]) -> list[Entry]:
        """Tensors under their entries' keys in as many files as it takes; the entries with their file's name."""
        seen: dict[str, Entry] = {}
        placed: list[Entry] = []

        def named() -> Iterator[tuple[str, torch.Tensor]]:
            for entry, tensor in entries:
                seen[entry.key] = entry
                yield entry.key, tensor

        for number, group in enumerate(tensorfile.shards(named())):
            file = f"{what}-rank{self._rank:05d}-{number:05d}.safetensors"
            self._write(file, group, metadata={"format": "pt"})
            placed += [replace(seen[key], file=file) for key in group]
        return placed

    def _write(self, name: str, tensors: dict[str, torch.Tensor], **options: Any) -> None:
        self.files[name] = tensorfile.write(self._folder / name, tensors, flush=self._flush, **options)


def _stored(fragment: Fragment, *, file: str) -> StoredFragment:
    assert fragment.kind in KINDS, f"unknown kind of optimizer state {fragment.kind!r}"
    assert fragment.tensor.dim() == 1, f"{fragment.name}: a fragment is 1-D, got {tuple(fragment.tensor.shape)}"
    dtype = fragment.tensor.dtype
    assert dtype in (torch.float32, torch.bfloat16), f"{fragment.name}: a fragment is fp32 or bf16, got {dtype}"
    rank = None if fragment.shard is None else fragment.shard.rank
    return StoredFragment(fragment.name, fragment.kind, fragment.start, fragment.tensor.numel(), file, rank)


def _dtype_name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_model(arch: ModelArch | None, model: ModelConfig | None, *, model_type: str) -> dict[str, Any]:
    sizes = {k: v for k, v in vars(arch).items() if isinstance(v, (int, str))} if arch else {}
    settings = {k: v for k, v in vars(model).items() if v is None or isinstance(v, (int, float, str))} if model else {}
    return {"model_type": model_type, "sizes": sizes, "settings": settings}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("internlm_ds", "torch", "deepspeed", "numpy", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _texts(train_state_value: dict[str, Any], config_text: str) -> dict[str, str]:
    """The small files of the whole job; none is empty."""
    return {TRAIN_STATE: train_state.dumps(train_state_value), CONFIG: config_text or "# no configuration\n"}


def _finish(
    folder: Path,
    reports: list[_RankReport],
    *,
    head: Manifest,
    arch: ModelArch | None,
    arrived: Callable[[], Mapping[str, int]],
) -> None:
    """Rank 0's part: the checks over all ranks, the manifest."""
    files = {name: record for report in reports for name, record in report.files.items()}
    parameters = [p for report in reports for p in report.parameters]
    fragments = [f for report in reports for f in report.fragments]
    problems = [
        *check_parameters(parameters, arch=arch),
        *check_fragments(fragments, parameters),
        *check_visible(folder, {name: record.size for name, record in files.items()}, arrived()),
    ]
    if problems:
        raise CheckpointError(
            f"{len(problems)} things are wrong with what the ranks wrote:\n  " + "\n  ".join(problems)
        )
    whole = replace(
        head,
        parameters=tuple(parameters),
        fragments=tuple(fragments),
        random_states=sum(report.has_random_state for report in reports),
        files=dict(sorted(files.items())),
    )
    diskfile.write_bytes(folder / manifests.NAME, manifests.render(whole).encode())
