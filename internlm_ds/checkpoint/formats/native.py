"""The native format: one folder per checkpoint, independent of the layout that wrote it.

Weights lie by logical name in safetensors files, one set per rank that owns weights: whole, or as the shards that
tensor ranks held, `NAME@tensor1`, each described in the manifest. Optimizer state lies in fragments: 1-D fp32 slices of
what was flattened, a whole parameter or a shard, keyed `exp_avg/NAME@START`, as each rank happened to own them. A
reader asks for a whole parameter, for any shard of it or for any slice, and gets it from what is there. Beside them:
`train_state.json`, one random state per rank, `config.py`, and `manifest.json`, written last. Everything is written
into a temporary folder and appears under its name by one rename, or not at all.

When to save and what to load is the manager's; shapes of parameters are the blueprint's.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint import tensorfile, train_state
from internlm_ds.checkpoint.agree import Comm, Solo, collect, on_first_rank
from internlm_ds.checkpoint.completeness import check_fragments, check_parameters, check_visible
from internlm_ds.checkpoint.manifest import Manifest, StoredFragment, StoredParameter, key_of
from internlm_ds.checkpoint.storage.base import Storage
from internlm_ds.checkpoint.storage.local import LocalStorage
from internlm_ds.checkpoint.tensorfile import FileRecord, TensorReader
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.shards import join, take

MASTER, EXP_AVG, EXP_AVG_SQ = KINDS = ("master", "exp_avg", "exp_avg_sq")
EMBEDDINGS = {"embedding.weight": "embedding.word_embeddings.weight"}
EMBEDDINGS |= {new: old for old, new in EMBEDDINGS.items()}
TRAIN_STATE, CONFIG = "train_state.json", "config.py"


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
        kind: `master` (fp32 weights), `exp_avg` or `exp_avg_sq`.
        tensor: fp32 `(numel,)`.
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
        reports = collect(
            comm,
            lambda: _write_rank(temporary, rank=comm.rank, weights=weights, fragments=fragments, rng_state=rng_state),
            doing=f"saving {final}",
        )

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
            _finish(temporary, reports, head=head, train_state_value=train_state, config_text=config_text, arch=arch)
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
) -> _RankReport:
    files: dict[str, FileRecord] = {}
    parameters: list[StoredParameter] = []
    stored: list[StoredFragment] = []
    written: dict[str, StoredParameter] = {}

    def named_weights() -> Iterable[tuple[str, torch.Tensor]]:
        for weight in (Weight(*item) for item in weights):
            entry = StoredParameter(weight.name, weight.shape, _dtype_name(weight.tensor.dtype), "", weight.shard)
            written[entry.key] = entry
            yield entry.key, weight.tensor

    for number, group in enumerate(tensorfile.shards(named_weights())):
        file = f"weights-rank{rank:05d}-{number:05d}.safetensors"
        files[file] = tensorfile.write(folder / file, group, metadata={"format": "pt"})
        parameters += [replace(written[key], file=file) for key in group]
    described = ((_stored(f, file=""), f.tensor) for f in fragments if f.tensor.numel())
    entries: dict[str, StoredFragment] = {}

    def named() -> Iterable[tuple[str, torch.Tensor]]:
        for entry, tensor in described:
            entries[entry.key] = entry
            yield entry.key, tensor

    for number, group in enumerate(tensorfile.shards(named())):
        file = f"optimizer-rank{rank:05d}-{number:05d}.safetensors"
        files[file] = tensorfile.write(folder / file, group, metadata={"format": "pt"})
        stored += [replace(entries[key], file=file) for key in group]
    files |= _write_random_state(folder, rng_state, rank=rank)
    return _RankReport(files, parameters, stored, has_random_state=rng_state is not None)


def _stored(fragment: Fragment, *, file: str) -> StoredFragment:
    assert fragment.kind in KINDS, f"unknown kind of optimizer state {fragment.kind!r}"
    assert fragment.tensor.dim() == 1, f"{fragment.name}: a fragment is 1-D, got {tuple(fragment.tensor.shape)}"
    assert fragment.tensor.dtype == torch.float32, f"{fragment.name}: a fragment is fp32, got {fragment.tensor.dtype}"
    rank = None if fragment.shard is None else fragment.shard.rank
    return StoredFragment(fragment.name, fragment.kind, fragment.start, fragment.tensor.numel(), file, rank)


def _write_random_state(folder: Path, rng_state: dict[str, Any] | None, *, rank: int) -> dict[str, FileRecord]:
    if rng_state is None:
        return {}
    tensors: dict[str, torch.Tensor] = {}
    text = train_state.dumps(rng_state, tensors)
    name = _random_file(rank)
    files = {f"{name}.json": tensorfile.write_bytes(folder / f"{name}.json", text.encode())}
    if tensors:
        files[f"{name}.safetensors"] = tensorfile.write(folder / f"{name}.safetensors", tensors)
    return files


def _random_file(rank: int) -> str:
    return f"random-rank{rank:05d}"


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


def _finish(
    folder: Path,
    reports: list[_RankReport],
    *,
    head: Manifest,
    train_state_value: dict[str, Any],
    config_text: str,
    arch: ModelArch | None,
) -> None:
    """Rank 0's part: the small files, the checks over all ranks, the manifest."""
    files = {name: record for report in reports for name, record in report.files.items()}
    files[TRAIN_STATE] = tensorfile.write_bytes(folder / TRAIN_STATE, train_state.dumps(train_state_value).encode())
    files[CONFIG] = tensorfile.write_bytes(folder / CONFIG, (config_text or "# no configuration\n").encode())
    parameters = [p for report in reports for p in report.parameters]
    fragments = [f for report in reports for f in report.fragments]
    problems = [
        *check_parameters(parameters, arch=arch),
        *check_fragments(fragments, parameters),
        *check_visible(folder, files),
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
    tensorfile.write_bytes(folder / manifests.NAME, manifests.render(whole).encode())


def open(folder: str | Path, *, verify: bool = True, comm: Comm | None = None) -> NativeCheckpoint:
    """Open a checkpoint for reading.

    Args:
        verify: Compare every file with its checksum first.
        comm: The ranks that open it together: each compares its share of the files, and all learn the outcome.
    Raises:
        CheckpointError: No native checkpoint there, or one of a later version.
        CheckpointDamagedError: A file is missing or differs from the manifest; says which, and what differs.
    """
    path, comm = Path(folder), comm or Solo()

    def checked() -> Manifest:
        manifest = manifests.read(path)
        share = [name for i, name in enumerate(manifest.files) if i % comm.world_size == comm.rank]
        manifests.verify(path, manifest, names=share if verify else ())
        return manifest

    opened: list[Manifest] = []  # stays on its rank: only the outcome travels
    collect(comm, lambda: opened.append(checked()), doing=f"checking {path}")
    return NativeCheckpoint(path, opened[0])


class NativeCheckpoint:
    """A checkpoint on the disk; tensors are read when they are asked for, and only as much as was asked for."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._reader = TensorReader(folder)
        self._parameters: dict[str, list[StoredParameter]] = defaultdict(list)
        for parameter in manifest.parameters:
            self._parameters[parameter.name].append(parameter)
        # by what was flattened, and kind
        self._fragments: dict[tuple[str, str], list[StoredFragment]] = defaultdict(list)
        for fragment in sorted(manifest.fragments, key=lambda f: f.start):
            self._fragments[key_of(fragment.name, fragment.tensor_rank), fragment.kind].append(fragment)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def layout(self) -> Layout:
        """Layout of the run that wrote it."""
        return Layout(**self.manifest.layout)

    @property
    def dtype(self) -> str:
        return self.manifest.dtype

    @property
    def train_state(self) -> dict[str, Any]:
        return train_state.loads(self._text(TRAIN_STATE))

    @property
    def config_text(self) -> str:
        return self._text(CONFIG)

    @property
    def model_config(self) -> ModelConfig | None:
        """The model's settings, None if the writer did not give them."""
        settings = self.manifest.model.get("settings")
        known = {field.name for field in fields(ModelConfig)}
        return ModelConfig(**{k: v for k, v in settings.items() if k in known}) if settings else None

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(self._parameters)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {p.name: p.shape for p in self.manifest.parameters}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of optimizer state it holds, () for a checkpoint of weights only."""
        held = {kind for _, kind in self._fragments}
        return tuple(kind for kind in KINDS if kind in held)

    def weight(self, name: str, shard: Shard | None = None) -> torch.Tensor:
        """A parameter, or a shard of it in whatever way it is stored, in the dtype it was stored in.

        Raises:
            CheckpointError: There is none of this name.
        """
        stored = self._stored(name)
        for held in stored:
            if held.shard == shard:
                return self._reader.tensor(held.file, held.key)
        if stored[0].shard is None:
            assert shard is not None, "a whole parameter was asked for, and is stored"
            return self._reader.spans(stored[0].file, stored[0].key, dim=shard.dim, spans=shard.spans)
        return take(join({h.shard: self._reader.tensor(h.file, h.key) for h in stored if h.shard is not None}), shard)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """All parameters by name; each is read when it is asked for."""
        return _StoredWeights(self)

    def check_fits(self, arch: ModelArch) -> None:
        """Raise `CheckpointError` listing the parameters that are missing, extra or of another shape than `arch`'s."""
        wanted = {self._known(spec.name): tuple(spec.shape) for spec in arch.iter_params()}
        stored = self.shapes
        problems = [f"{name} {list(shape)}: missing" for name, shape in wanted.items() if name not in stored]
        problems += [f"{name} {list(stored[name])}: the model has no such parameter" for name in stored.keys() - wanted]
        problems += [
            f"{name}: shape {list(stored[name])} in the files, the model has {list(shape)}"
            for name, shape in wanted.items()
            if stored.get(name, shape) != shape
        ]
        if problems:
            count = f"{len(problems)} parameter{'s' if len(problems) > 1 else ''}"
            raise CheckpointError(f"{self.folder} does not fit the model ({count}):\n  " + "\n  ".join(problems))

    def fragment(self, name: str, kind: str, start: int, numel: int, shard: Shard | None = None) -> torch.Tensor:
        """fp32 `(numel,)`: elements `[start, start + numel)` of a kind of optimizer state of a flattened parameter.

        Args:
            shard: What is flattened, in whatever way it is stored; None: the whole parameter.
        Raises:
            CheckpointError: The checkpoint lacks this kind, this parameter or part of the range.
        """
        stored = self._stored(name)
        for held in stored:
            if held.shard == shard:
                return self._range(held.key, kind, start, numel)
        pieces = {held.shard: self._whole_range(held, kind) for held in stored}
        whole = pieces[None] if None in pieces else join(pieces)
        return take(whole, shard).flatten()[start : start + numel]

    def _whole_range(self, held: StoredParameter, kind: str) -> torch.Tensor:
        shape = held.shape if held.shard is None else held.shard.shape(held.shape)
        return self._range(held.key, kind, 0, held.numel).view(shape)

    def _range(self, key: str, kind: str, start: int, numel: int) -> torch.Tensor:
        pieces, position, stop = [], start, start + numel
        for stored in self._fragments.get((key, kind), ()):
            if stored.stop > position and stored.start <= position < stop:
                low, high = position - stored.start, min(stop, stored.stop) - stored.start
                pieces.append(self._reader.range(stored.file, stored.key, low, high))
                position = stored.start + high
        if position < stop:
            raise CheckpointError(
                f"{self.folder} has no {kind} for elements {position} to {stop} of {key!r}; it holds "
                f"{', '.join(self.kinds) or 'no optimizer state'}"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)

    def _stored(self, name: str) -> list[StoredParameter]:
        """A parameter as it is stored: whole, or all its shards."""
        name = self._known(name)
        if name not in self._parameters:
            raise CheckpointError(f"{self.folder} has no parameter {name!r}; it has {_sample(self._parameters)}")
        return self._parameters[name]

    def _known(self, name: str) -> str:
        """The name that is stored: `embed_split_hidden` renames the embedding, the whole matrix is the same."""
        other = EMBEDDINGS.get(name)
        return other if other in self._parameters and name not in self._parameters else name

    def rng_state(self, rank: int) -> dict[str, Any] | None:
        """The random states that this rank had, None if none were stored for it."""
        file = f"{_random_file(rank)}.json"
        if file not in self.manifest.files:
            return None
        tensor_file = f"{_random_file(rank)}.safetensors"
        tensors = {}
        if tensor_file in self.manifest.files:
            tensors = {n: self._reader.tensor(tensor_file, n) for n in self._reader.names(tensor_file)}
        return train_state.loads(self._text(file), tensors)

    def _text(self, file: str) -> str:
        try:
            return (self.folder / file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointDamagedError(f"{self.folder / file} cannot be read: {error}") from error


class _StoredWeights(Mapping[str, torch.Tensor]):
    def __init__(self, checkpoint: NativeCheckpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._checkpoint.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.weight_names)

    def __len__(self) -> int:
        return len(self._checkpoint.weight_names)


def _sample(names: Iterable[str], *, count: int = 4) -> str:
    known = list(names)
    return ", ".join(known[:count]) + (f", … ({len(known)} in all)" if len(known) > count else "")
