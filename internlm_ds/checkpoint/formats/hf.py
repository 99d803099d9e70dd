"""Hugging Face folders: weights written and read one tensor at a time.

Writes `config.json`, `generation_config.json`, safetensors (sharded, with an index, where one file would be too large)
and the tokenizer's files. Reads safetensors, and `pytorch_model*.bin` through our own reader (`unpickle`). Names are
`hf_names`', settings `hf_config`'s, the order of rows `qkv`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import normalize, pad

from internlm_ds.arch.parts import MLP_WIDTH_MULTIPLE
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint import tensorfile, unpickle
from internlm_ds.checkpoint.formats import hf_config, hf_tokenizer
from internlm_ds.checkpoint.formats.hf_names import LLAMA_EMBEDDING, LLAMA_HEAD, Piece, pieces, pieces_of
from internlm_ds.checkpoint.formats.hf_tokenizer import write_json
from internlm_ds.checkpoint.tensorfile import TensorReader, TensorSpec
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError

MAX_SHARD_BYTES = 10 * 10**9
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def write(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    *,
    model: ModelConfig,
    arch: ModelArch,
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a whole folder's content into an existing empty one; one parameter at a time is in memory.

    Raises:
        ConversionError: The model has no Hugging Face form, or the tokenizer is no sentencepiece model.
    """
    hf_config.check(model, arch)
    bos, eos, end = (hf_tokenizer.BOS, hf_tokenizer.EOS, hf_tokenizer.PAD)
    special = hf_tokenizer.write(folder, tokenizer) if tokenizer else (bos, eos, end)
    write_json(folder / hf_config.CONFIG, hf_config.render(model, arch, dtype=dtype, special=special))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(
        folder / "generation_config.json", {"_from_model_config": True, **dict(zip(names, special, strict=True))}
    )
    targets = [_Target(piece, TensorSpec(piece.name, dtype, piece.shape)) for piece in pieces(arch)]
    shards = list(_shards(targets, max_bytes=max_shard_bytes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _make(shard, exported(weights, model=model, arch=arch))
        record = tensorfile.write_stream(folder / file, [t.spec for t in shard], tensors, metadata={"format": "pt"})
        placed |= {target.spec.name: file for target in shard}
        progress(f"wrote {file} ({record.size / 1e9:.2f} GB)")
    if len(shards) > 1:
        total = sum(target.spec.size for shard in shards for target in shard)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def exported(weights: Mapping[str, torch.Tensor], *, model: ModelConfig, arch: ModelArch) -> Mapping[str, torch.Tensor]:
    """Weights as they go into a folder: the rows of a `norm_head` are normalised, no class there does it itself."""
    return _NormalisedHead(weights, arch.layers[-1].params[0].name) if model.norm_head else weights


class _NormalisedHead(Mapping[str, torch.Tensor]):
    def __init__(self, weights: Mapping[str, torch.Tensor], head: str):
        self._weights, self._head = weights, head

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        return normalize(weight.float(), dim=1).to(weight.dtype) if name == self._head else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class _Target:
    piece: Piece
    spec: TensorSpec


def _shards(targets: Iterable[_Target], *, max_bytes: int) -> Iterator[list[_Target]]:
    shard: list[_Target] = []
    filled = 0
    for target in targets:
        if shard and filled + target.spec.size > max_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(target)
        filled += target.spec.size
    if shard:
        yield shard


def _make(shard: Sequence[_Target], weights: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    source, whole = "", torch.empty(0)
    for target in shard:
        piece = target.piece
        if piece.source != source:
            whole = torch.empty(0)  # before the next one is read
            source, whole = piece.source, weights[piece.source]
        rows = whole.chunk(piece.parts)[piece.part]
        rows = piece.heads.to_halves(rows) if piece.heads else rows
        yield rows.to(target.spec.dtype)


# ---- reading --------------------------------------------------------------------------------------------------------


class _Reader(Protocol):
    """Tensors of a folder by name."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> torch.Tensor: ...


def read_weights(folder: str | Path, *, arch: ModelArch) -> HfWeights:
    """The weights of a folder under their logical names, read one at a time.

    Rows of queries and keys come in the order of `arch`; an MLP whose width is no multiple of 256 is filled up with
    zeros; a tied head is read from the embedding.

    Raises:
        CheckpointError: No weights there, or parameters that are missing, extra or of another shape (all listed).
    """
    folder = Path(folder)
    reader = _open(folder)
    wanted = {piece.name: piece for piece in pieces(arch)}
    if LLAMA_HEAD in wanted and LLAMA_HEAD not in reader and LLAMA_EMBEDDING in reader and _is_tied(folder):
        reader = _Tied(reader)
    width = _mlp_width(reader, wanted.values(), arch)
    problems = [f"{name}: missing" for name in wanted if name not in reader]
    problems += [f"{name}: the model has no such parameter" for name in reader if name not in wanted]
    for name, piece in wanted.items():
        shape = _shape_there(piece, width)
        if name in reader and (found := reader.shape(name)) != shape:
            problems.append(f"{name}: shape {list(found)} in the files, the model has {list(shape)}")
    if problems:
        raise CheckpointError(
            f"{folder} does not fit the model ({len(problems)} parameters):\n  " + "\n  ".join(problems)
        )
    return HfWeights(arch, reader)


def _is_tied(folder: Path) -> bool:
    return (folder / hf_config.CONFIG).is_file() and hf_config.is_tied(hf_config.load(folder))


def _mlp_width(reader: _Reader, wanted: Iterable[Piece], arch: ModelArch) -> int:
    """Width of the MLP in the files, if zeros up to the next multiple of 256 make it the model's; else the model's."""
    first = next((piece for piece in wanted if piece.mlp_dim == 0 and piece.name in reader), None)
    found = reader.shape(first.name)[0] if first else 0
    return found if 0 <= arch.mlp_hidden_size - found < MLP_WIDTH_MULTIPLE else arch.mlp_hidden_size


def _shape_there(piece: Piece, width: int) -> tuple[int, ...]:
    return tuple(width if dim == piece.mlp_dim else size for dim, size in enumerate(piece.shape))


def _open(folder: Path) -> _Reader:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
    if (folder / INDEX).exists() or any(folder.glob("*.safetensors")):
        return _Safetensors(folder)
    if (folder / BIN_INDEX).exists() or any(folder.glob("pytorch_model*.bin")):
        return _Bin(folder)
    raise CheckpointError(f"{folder} holds neither *.safetensors nor pytorch_model*.bin")


def _indexed(folder: Path, index: str) -> dict[str, str] | None:
    """Tensor name to file, as an index says; None without one.

    Raises:
        CheckpointError: The index is damaged, or names a file outside its folder or one that is not there.
    """
    path = folder / index
    if not path.exists():
        return None
    try:
        placed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of weights: {error!r}") from error
    for file in sorted(set(placed.values())):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path} names {file!r}, which is no file of this folder")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} is incomplete: its index names {file}, which is not there")
    return placed


class _Safetensors:
    def __init__(self, folder: Path):
        self._reader = TensorReader(folder)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        self._files = _indexed(folder, INDEX) or {name: f for f in files for name in self._reader.names(f)}

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._files if not name.endswith("inv_freq"))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(self._files[name], name)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._files[name], name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._reader.tensor(self._files[name], name)


class _Bin:
    def __init__(self, folder: Path):
        placed = _indexed(folder, BIN_INDEX)
        files = sorted(set(placed.values())) if placed else sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        self._tensors: dict[str, unpickle.LazyTensor] = {}
        for file in files:
            state = unpickle.load(folder / file, lazy=True)
            if not isinstance(state, dict) or not all(isinstance(t, unpickle.LazyTensor) for t in state.values()):
                raise CheckpointError(f"{folder / file} is no state dict: names with tensors were expected")
            self._tensors |= state

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if not name.endswith("inv_freq"))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name].load()


class _Tied:
    """A folder whose head is the embedding, as one that holds both."""

    def __init__(self, reader: _Reader):
        self._reader = reader

    def __contains__(self, name: object) -> bool:
        return name == LLAMA_HEAD or name in self._reader

    def __iter__(self) -> Iterator[str]:
        yield from self._reader
        yield LLAMA_HEAD

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.shape(LLAMA_EMBEDDING if name == LLAMA_HEAD else name)

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(LLAMA_EMBEDDING if name == LLAMA_HEAD else name)

    def tensor(self, name: str) -> torch.Tensor:
        return self._reader.tensor(LLAMA_EMBEDDING if name == LLAMA_HEAD else name)


class HfWeights(Mapping[str, torch.Tensor]):
    """Whole parameters by logical name, each read when it is asked for."""

    def __init__(self, arch: ModelArch, reader: _Reader):
        self._pieces = {spec.name: pieces_of(arch, spec) for spec in arch.iter_params()}
        self._reader = reader

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._pieces[name]
        if len(found) == 1:
            return self._read(found[0])
        # q, k and v of a packed matrix, each read into its place
        first = self._read(found[0])
        whole = first.new_empty((len(first) * len(found), *first.shape[1:]))
        for piece, rows in zip(found, whole.chunk(len(found)), strict=True):
            rows.copy_(first if piece.part == 0 else self._read(piece))
        return whole

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._pieces[name][0].name)

    def _read(self, piece: Piece) -> torch.Tensor:
        tensor = self._reader.tensor(piece.name)
        if piece.mlp_dim is not None and (missing := piece.shape[piece.mlp_dim] - tensor.shape[piece.mlp_dim]):
            tensor = pad(tensor, (0, missing) if piece.mlp_dim == 1 else (0, 0, 0, missing))
        return piece.heads.to_neighbours(tensor) if piece.heads else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)
