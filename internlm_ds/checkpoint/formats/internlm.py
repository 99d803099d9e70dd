"""InternLM's own checkpoint folders: `model_tp{t}_pp{p}.pt` and what lies beside them.

Reads weights of any tensor and pipeline size into whole parameters under their logical names, one parameter at a
time, and writes them again for any layout. The opening of `.pt` files is `unpickle`'s; names and shapes are the
blueprint's. What lies beside the weights (optimizer, counters, sampler) is `internlm_run`'s.

Layer numbers start at 0 in every stage and chunk; with several chunks the names begin with `{chunk}.model.`. The
global number counts chunk by chunk, within a chunk stage by stage.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from internlm_ds.arch.parts import EMBEDDING_SPLIT, EMBEDDINGS
from internlm_ds.arch.spec import ModelArch, ParamSpec
from internlm_ds.checkpoint import unpickle
from internlm_ds.checkpoint.names import MODEL_FILE, OTHER_SPLIT
from internlm_ds.checkpoint.tensorfile import TensorSpec
from internlm_ds.checkpoint.torchfile import StateFile
from internlm_ds.checkpoint.unpickle import LazyTensor
from internlm_ds.errors import CheckpointError, ConversionError
from internlm_ds.layout.stages import partition_uniform

log = logging.getLogger(__name__)

MLP_NAMES = ("2023", "2024")
_COPY_BYTES = 2**22
_NAME = re.compile(r"(?:(\d+)\.)?(?:model\.)?(?:(blocks|layers)\.(\d+)\.)?(.+)$")
_MLP_2023 = {
    f"{mlp}.{a}.weight": f"{mlp}.{b}.weight" for mlp in ("mlp", "feed_forward") for a, b in (("w2", "w3"), ("w3", "w2"))
}
MODEL_TYPES = {"internlm": "INTERNLM", "internlm2": "INTERNLM2_PUBLIC", "llama": "LLAMA2"}
_MARKS = {".mixer.Wqkv.": "INTERNLM", ".attention.wqkv.": "INTERNLM2_PUBLIC", ".attention.wq.": "LLAMA2"}
"""What the name of a parameter says about the model type."""


class Stored(Protocol):
    """A tensor that still lies in a file, a weight or a piece of optimizer state."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def load(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class _Key:
    """A name in a file: chunk, layer within stage and chunk (None outside blocks), the rest.

    `blocks` is what the family calls its blocks: `blocks` or `layers`.
    """

    chunk: int
    layer: int | None
    rest: str
    blocks: str

    @classmethod
    def parse(cls, name: str) -> _Key:
        chunk, blocks, layer, rest = _NAME.match(name).groups()
        return cls(int(chunk or 0), None if layer is None else int(layer), rest, blocks or "")

    def logical(self, first_layer: Mapping[tuple[int, int], int], stage: int) -> str:
        """The name with the layer's number in the whole model."""
        if self.layer is None:
            return self.rest
        return f"{self.blocks}.{first_layer[self.chunk, stage] + self.layer}.{self.rest}"


def read_weights(folder: str | Path, *, arch: ModelArch, mlp_names: str | None = None) -> Mapping[str, torch.Tensor]:
    """The weights of an InternLM checkpoint, merged over tensor and pipeline ranks, by logical name.

    Args:
        folder: Holds `model_tp{t}_pp{p}.pt` for every t and p.
        arch: What is to be loaded into.
        mlp_names: Meaning of w2 and w3: "2023" (w3 is the row matrix), "2024" (w2 is) or None, told by their shapes.
    Returns:
        A mapping that reads each parameter when it is asked for.
    Raises:
        CheckpointError: No such files, files of some ranks missing, or parameters that are missing, extra or of
            another shape (all of them listed).
    """
    folder = Path(folder)
    _check_model_config(folder, arch=arch)
    return merged(read_states(folder), folder=folder, arch=arch, mlp_names=mlp_names)


def read_states(folder: Path) -> dict[tuple[int, int], dict[str, LazyTensor]]:
    """`(tensor rank, stage)` to that file's state dict, the tensors left in the file.

    Raises:
        CheckpointError: No such files, files of some ranks missing, or one that is no state dict.
    """
    return {key: _read_state(path) for key, path in sorted(find_model_files(folder).items())}


def merged(
    states: Mapping[tuple[int, int], Mapping[str, Stored]], *, folder: Path, arch: ModelArch, mlp_names: str | None
) -> Mapping[str, torch.Tensor]:
    """Whole parameters by logical name from the parts that ranks hold under their local names.

    Args:
        states: By `(tensor rank, stage)`.
        folder: For messages.
    Raises:
        CheckpointError: Parameters are missing, extra or of another shape (all of them listed).
    """
    shards = _collect(states)
    tensor_size = 1 + max(rank for rank, _ in states)
    if _mlp_names(shards, folder=folder, asked=mlp_names) == "2023":
        shards = {_exchange(name): tensors for name, tensors in shards.items()}
    sources = _with_aliases(shards, arch)
    problems = _compare(shards, sources, arch=arch, tensor_size=tensor_size)
    if problems:
        count = f"{len(problems)} parameter{'s' if len(problems) > 1 else ''}"
        raise CheckpointError(f"{folder} does not fit the model ({count}):\n  " + "\n  ".join(problems))
    return _Weights(sources)


def find_model_files(folder: Path) -> dict[tuple[int, int], Path]:
    """`(tensor rank, stage)` to file.

    Raises:
        CheckpointError: The folder does not exist, holds no such file, or those of some ranks are missing.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist or is no folder")
    found = {
        (int(m[1]), int(m[2])): path for path in sorted(folder.iterdir()) if (m := MODEL_FILE.fullmatch(path.name))
    }
    split = [path.name for path in sorted(folder.iterdir()) if OTHER_SPLIT.fullmatch(path.name)]
    if split:
        raise CheckpointError(
            f"{folder}: {split[0]} was written with the weights themselves split over ranks (isp or fsdp), which this "
            "version does not read; save it once in mtp mode"
        )
    if not found:
        raise CheckpointError(
            f"{folder} is no InternLM checkpoint: it has no model_tp0_pp0.pt; {_what_lies_there(folder)}"
        )
    tensor, pipe = (max(key[axis] for key in found) + 1 for axis in (0, 1))
    missing = [f"model_tp{t}_pp{p}.pt" for p in range(pipe) for t in range(tensor) if (t, p) not in found]
    if missing:
        raise CheckpointError(
            f"{folder} is incomplete: its files are of {tensor} tensor ranks and {pipe} stages, without "
            f"{', '.join(missing)}"
        )
    return found


def _what_lies_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "it is empty"


def _check_model_config(folder: Path, *, arch: ModelArch) -> None:
    """`model_config.pt`, where there is one, must speak of the same model; files of the weights tell the rest."""
    stored = read_model_config(folder)
    kind, wanted = stored.get("model_type"), MODEL_TYPES[arch.family]
    if kind is not None and kind != wanted:
        raise CheckpointError(f"{folder / 'model_config.pt'}: model_type is {kind!r}; to be loaded is {wanted!r}")
    adapt_hf = arch.rotary_pairs == "halves"
    if arch.family != "internlm" and stored.get("adapt_hf", adapt_hf) not in (adapt_hf, None):
        raise CheckpointError(
            f"{folder / 'model_config.pt'}: adapt_hf is {stored['adapt_hf']}, the model has {adapt_hf}: rows of q and "
            f"k lie in the other order; write adapt_hf={stored['adapt_hf']} in the model dict"
        )
    expected = {
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_kv_attention_heads": arch.num_kv_attention_heads,
        "num_layers": arch.num_layers,
        "vocab_size": arch.vocab_size,
    }
    wrong = [f"{k} is {stored[k]}, the model has {v}" for k, v in expected.items() if stored.get(k) not in (None, v)]
    if wrong:
        raise CheckpointError(f"{folder / 'model_config.pt'} is of another model: " + "; ".join(wrong))


def read_model_config(folder: Path) -> dict[str, Any]:
    """The `model` dict of the run that wrote the checkpoint, {} where it was not stored."""
    path = folder / "model_config.pt"
    if not path.exists():
        return {}
    stored = unpickle.load(path, lazy=True)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path}: a dict was expected, found {type(stored).__name__}")
    return stored


def model_type_of(folder: Path) -> str | None:
    """The model type that the names of a checkpoint's parameters belong to, None for an unknown one.

    Raises:
        CheckpointError: As `find_model_files`.
    """
    files = find_model_files(folder)
    names = " ".join(name for path in files.values() for name in _read_state(path))
    return next((kind for mark, kind in _MARKS.items() if mark in names), None)


def _collect(states: Mapping[tuple[int, int], Mapping[str, Stored]]) -> dict[str, list[Stored]]:
    """Logical name to the shards of all tensor ranks, in rank order (fewer where only some hold it)."""
    first_layer = _first_layers(states, pipe=max(p for _, p in states) + 1)
    shards: dict[str, list[Stored]] = defaultdict(list)
    for (_, stage), state in states.items():
        for name, tensor in state.items():
            shards[_Key.parse(name).logical(first_layer, stage)].append(tensor)
    return dict(shards)


def _read_state(path: Path) -> dict[str, LazyTensor]:
    state = unpickle.load(path, lazy=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, LazyTensor) for tensor in state.values()):
        raise CheckpointError(f"{path} is no state dict: names with tensors were expected")
    return {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}


def _first_layers(states: Mapping[tuple[int, int], Mapping[str, Stored]], *, pipe: int) -> dict[tuple[int, int], int]:
    """`(chunk, stage)` to the global number of its first layer, from what tensor rank 0's files hold."""
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for (tensor, stage), state in states.items():
        for name in state if tensor == 0 else ():
            key = _Key.parse(name)
            if key.layer is not None:
                counts[key.chunk, stage] = max(counts[key.chunk, stage], key.layer + 1)
    chunks = 1 + max((chunk for chunk, _ in counts), default=0)
    first, total = {}, 0
    for chunk in range(chunks):
        for stage in range(pipe):
            first[chunk, stage] = total
            total += counts[chunk, stage]
    return first


def _mlp_names(shards: Mapping[str, list[Stored]], *, folder: Path, asked: str | None) -> str:
    """Which of w2 and w3 is the row matrix: "2024" says w2, "2023" says w3. w1 is a column matrix in both."""
    first = {
        n: shards[key][0].shape
        for n in ("w1", "w2", "w3")
        for mlp in ("blocks.0.mlp", "layers.0.feed_forward")
        if (key := f"{mlp}.{n}.weight") in shards
    }
    if len(first) < 3:
        return "2024"
    found = None
    if first["w2"] != first["w3"]:
        found = "2024" if first["w3"] == first["w1"] else "2023"
    shapes = ", ".join(f"{n} {list(shape)}" for n, shape in first.items())
    if found and asked and found != asked:
        raise CheckpointError(
            f"{folder}: compat.mlp_names is {asked!r}, but the files have {shapes}: that is {found!r}"
        )
    if not found and asked is None:
        raise CheckpointError(
            f"{folder}: the shapes of w2 and w3 do not tell whether they are named as in 2023 (w3 maps back "
            f"to the hidden size) or as in 2024 (w2 does): {shapes}. Say which: "
            'internlm_ds = dict(compat=dict(mlp_names="2024"))'
        )
    names = found or asked
    if names == "2023":
        log.info("%s names its MLP matrices as in 2023 (%s): w2 and w3 are exchanged", folder, shapes)
    return names


def _exchange(name: str) -> str:
    for old, new in _MLP_2023.items():
        if name.endswith("." + old):
            return name.removesuffix(old) + new
    return name


class _Weights(Mapping[str, torch.Tensor]):
    """Merges a parameter's shards when it is asked for, so that one parameter at a time is in memory."""

    def __init__(self, sources: Mapping[str, tuple[ParamSpec, list[Stored]]]):
        self._sources = sources

    def __getitem__(self, name: str) -> torch.Tensor:
        spec, shards = self._sources[name]
        return merge(shards, spec)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def dtype(self, name: str) -> torch.dtype:
        return self._sources[name][1][0].dtype


def merge(shards: Sequence[Stored], spec: ParamSpec) -> torch.Tensor:
    """The whole parameter from its shards in tensor-rank order, one read at a time; replicas are taken from rank 0."""
    if spec.split_dim is None or len(shards) == 1:
        return shards[0].load()
    whole, position = torch.empty(spec.shape, dtype=shards[0].dtype), 0
    # every shard holds its slice of each part, [q_r; k_r; v_r] for example
    parts = whole.unflatten(spec.split_dim, (spec.parts, -1))
    for shard in shards:
        width = shard.shape[spec.split_dim] // spec.parts
        mine = parts.narrow(spec.split_dim + 1, position, width)
        # parts of rows lie behind one another in the file; columns have one part
        targets = mine.unbind(0) if spec.split_dim == 0 else (mine.squeeze(1),)
        for number, target in enumerate(targets):
            _fill(target, shard, first=number * len(target))
        position += width
    return whole


def _fill(target: torch.Tensor, shard: Stored, *, first: int) -> None:
    """Copy rows of a shard, from `first` on, a few at a time: a shard is never in memory beside the whole."""
    if not (isinstance(shard, LazyTensor) and shard.is_contiguous):
        target.copy_(shard.load()[first : first + len(target)])
        return
    step = max(1, _COPY_BYTES // max(1, math.prod(shard.shape[1:]) * shard.dtype.itemsize))
    for start in range(0, len(target), step):
        stop = min(start + step, len(target))
        target[start:stop] = shard.rows(first + start, first + stop).load()


def split(tensor: torch.Tensor, spec: ParamSpec, *, tensor_size: int) -> list[torch.Tensor | None]:
    """What each tensor rank holds of a whole parameter; None where that is nothing. Inverse of `merge`."""
    if spec.on_first_tensor_rank_only:
        return [tensor, *[None] * (tensor_size - 1)]
    if spec.split_dim is None:
        return [tensor] * tensor_size
    dim = spec.split_dim
    pieces = tensor.unflatten(dim, (spec.parts, -1)).chunk(tensor_size, dim=dim + 1)
    return [piece.flatten(dim, dim + 1).contiguous() for piece in pieces]


def _with_aliases(shards: dict[str, list[Stored]], arch: ModelArch) -> dict[str, tuple[ParamSpec, list[Stored]]]:
    """Blueprint name to the spec as the files split it, and its shards.

    An embedding has one of two names, each with its own way to be split; whole, they are the same matrix.
    """
    sources = {}
    for spec in arch.iter_params():
        if spec.name in shards:
            sources[spec.name] = (spec, shards[spec.name])
        elif (other := EMBEDDINGS.get(spec.name)) in shards:
            sources[spec.name] = (replace(spec, split_dim=EMBEDDING_SPLIT[other]), shards[other])
    return sources


def _compare(
    shards: Mapping[str, list[Stored]],
    sources: Mapping[str, tuple[ParamSpec, list[Stored]]],
    *,
    arch: ModelArch,
    tensor_size: int,
) -> list[str]:
    """Parameters that are missing, extra or of another shape."""
    problems = [f"{spec.name} {list(spec.shape)}: missing" for spec in arch.iter_params() if spec.name not in sources]
    used = {id(held) for _, held in sources.values()}
    problems += [
        f"{name} {list(held[0].shape)}: the model has no such parameter"
        for name, held in shards.items()
        if id(held) not in used
    ]
    for spec, held in sources.values():
        wanted = local_shape(spec, tensor_size=tensor_size)
        count = 1 if spec.on_first_tensor_rank_only else tensor_size
        found = sorted({shard.shape for shard in held})
        if found != [wanted]:
            shown = " and ".join(str(list(shape)) for shape in found)
            share = f", that is {list(wanted)} on each of {tensor_size} tensor ranks" if wanted != spec.shape else ""
            problems.append(f"{spec.name}: shape {shown} in the files, the model has {list(spec.shape)}{share}")
        elif len(held) < count:
            problems.append(f"{spec.name}: held by {len(held)} of {tensor_size} tensor ranks")
    return problems


def local_shape(spec: ParamSpec, *, tensor_size: int) -> tuple[int, ...]:
    """Shape of what each tensor rank holds of a parameter."""
    if spec.split_dim is None:
        return tuple(spec.shape)
    return tuple(size // tensor_size if dim == spec.split_dim else size for dim, size in enumerate(spec.shape))


def write_weights(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    arch: ModelArch,
    tensor_size: int = 1,
    pipe: int = 1,
    chunks: int = 1,
    dtype: torch.dtype | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> None:
    """Write `model_tp{t}_pp{p}.pt`, `topo_tp{t}_pp{p}.json` and `model_config.pt` (a plain dict) into a folder.

    Raises:
        ConversionError: The model cannot be split that way; all reasons are listed.
    """
    check_split(arch, tensor_size=tensor_size, pipe=pipe, chunks=chunks)
    ranges = partition_uniform(arch.num_layers, pipe=pipe, chunks=chunks)
    for stage in range(pipe):
        params = list(stage_params(arch, ranges[stage], chunks=chunks))
        _write_stage(folder, weights, params, stage=stage, tensor_size=tensor_size, dtype=dtype)
    if model_config is not None:
        torch.save(dict(model_config), folder / "model_config.pt")


def _write_stage(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    params: Sequence[tuple[str, ParamSpec]],
    *,
    stage: int,
    tensor_size: int,
    dtype: torch.dtype | None,
) -> None:
    """The files of all tensor ranks of a stage, filled side by side: each parameter is read once."""
    dtype = dtype or weights[params[0][1].name].dtype
    with contextlib.ExitStack() as stack:
        files = []
        for rank in range(tensor_size):
            held = [(name, spec) for name, spec in params if rank == 0 or not spec.on_first_tensor_rank_only]
            specs = [TensorSpec(name, dtype, local_shape(spec, tensor_size=tensor_size)) for name, spec in held]
            files.append(stack.enter_context(StateFile(folder / f"model_tp{rank}_pp{stage}.pt", specs)))
            torch.save(_topology(name for name, _ in held), folder / f"topo_tp{rank}_pp{stage}.json")
        for _, spec in params:
            for file, piece in zip(files, split(weights[spec.name], spec, tensor_size=tensor_size), strict=True):
                if piece is not None:
                    file.add(piece.to(dtype))


def check_split(arch: ModelArch, *, tensor_size: int, pipe: int, chunks: int) -> None:
    """Raise `ConversionError` unless every parameter and the layers can be split so."""
    problems = []
    for spec in arch.iter_params():
        if spec.split_dim is not None:
            units = spec.shape[spec.split_dim] // (spec.parts * spec.granule)
            if units % tensor_size:
                problems.append(f"{spec.name}: {units} units do not divide by --tensor {tensor_size}")
    if arch.num_layers % chunks:
        problems.append(f"{arch.num_layers} layers do not divide by --chunks {chunks}")
    elif arch.num_layers // chunks < pipe:
        problems.append(f"{arch.num_layers} layers in {chunks} chunks are too few for --pipeline {pipe}")
    if problems:
        more = f"\n  and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ConversionError("this model cannot be split so:\n  " + "\n  ".join(problems[:6]) + more)


def stage_params(arch: ModelArch, ranges: Sequence[tuple[int, int]], *, chunks: int) -> Iterator[tuple[str, ParamSpec]]:
    """`(name in the file, spec)` of one stage; layer numbers start at 0 in each chunk."""
    for chunk, (start, stop) in enumerate(ranges):
        prefix = f"{chunk}.model." if chunks > 1 else ""
        for layer in arch.layers:
            first, last = layer.kind == "embedding", layer.kind in ("norm", "head")
            if layer.layer is not None and start <= layer.layer < stop:
                old = f"{layer.prefix}."
                new = f"{prefix}{layer.prefix.partition('.')[0]}.{layer.layer - start}."
                yield from ((new + spec.name.removeprefix(old), spec) for spec in layer.params)
            elif (first and start == 0) or (last and stop == arch.num_layers):
                yield from ((prefix + spec.name, spec) for spec in layer.params)


def _topology(state: Iterable[str]) -> dict[str, dict[str, int]]:
    """Modules whose vocabulary is split: InternLM keeps this beside the weights."""
    return {name.removesuffix(".weight"): {"dim": 0} for name in state if name.endswith("word_embeddings.weight")}
