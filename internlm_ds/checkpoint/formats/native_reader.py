"""Reading a native checkpoint: whole parameters, any shard of them, any slice of the optimizer state.

However the writing layout cut a parameter, a reader gets the part it asks for; only the rows that it needs are read,
and no parameter is put together whole for a rank that holds a part of it. Writing is `native`'s.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.parts import EMBEDDINGS
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import manifest as manifests
from internlm_ds.checkpoint import train_state
from internlm_ds.checkpoint.agree import Comm, Solo, collect
from internlm_ds.checkpoint.manifest import Manifest, StoredFragment, StoredParameter, key_of
from internlm_ds.checkpoint.reshard import gather_range, gather_rows
from internlm_ds.checkpoint.tensorfile import TensorReader
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.ranks import Layout
from internlm_ds.layout.shards import Shard

MASTER, EXP_AVG, EXP_AVG_SQ = KINDS = ("master", "exp_avg", "exp_avg_sq")
TRAIN_STATE, CONFIG = "train_state.json", "config.py"


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
        stored = {held.shard: held for held in self._stored(name)}
        if shard in stored:
            return self._reader.tensor(stored[shard].file, stored[shard].key)
        return gather_rows(partial(self._rows, stored), stored, wanted=shard, shape=_shape(stored))

    def _rows(
        self, stored: Mapping[Shard | None, StoredParameter], shard: Shard | None, start: int, stop: int
    ) -> torch.Tensor:
        return self._reader.range(stored[shard].file, stored[shard].key, start, stop)

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
        stored = {held.shard: held for held in self._stored(name)}
        if shard in stored:
            return self._range(stored[shard].key, kind, start, numel)
        read = partial(self._fragment_rows, stored, kind)
        return gather_range(read, stored, wanted=shard, shape=_shape(stored), start=start, stop=start + numel)

    def _fragment_rows(
        self, stored: Mapping[Shard | None, StoredParameter], kind: str, shard: Shard | None, start: int, stop: int
    ) -> torch.Tensor:
        held = stored[shard]
        shape = held.shape if shard is None else shard.shape(held.shape)
        width = math.prod(shape[1:])
        return self._range(held.key, kind, start * width, (stop - start) * width).view(stop - start, *shape[1:])

    def _range(self, key: str, kind: str, start: int, numel: int) -> torch.Tensor:
        pieces, position, stop = [], start, start + numel
        for stored in self._fragments.get((key, kind), ()):
            if stored.stop > position and stored.start <= position < stop:
                low, high = position - stored.start, min(stop, stored.stop) - stored.start
                pieces.append(self._reader.range(stored.file, stored.key, low, high).float())
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
        file = f"{random_file(rank)}.json"
        if file not in self.manifest.files:
            return None
        tensor_file = f"{random_file(rank)}.safetensors"
        tensors = {}
        if tensor_file in self.manifest.files:
            tensors = {n: self._reader.tensor(tensor_file, n) for n in self._reader.names(tensor_file)}
        return train_state.loads(self._text(file), tensors)

    def _text(self, file: str) -> str:
        try:
            return (self.folder / file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointDamagedError(f"{self.folder / file} cannot be read: {error}") from error


def _shape(stored: Mapping[Shard | None, StoredParameter]) -> tuple[int, ...]:
    """Of the whole parameter."""
    return next(iter(stored.values())).shape


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


def random_file(rank: int) -> str:
    """Name of the files of a rank's random states, without its ending."""
    return f"random-rank{rank:05d}"
