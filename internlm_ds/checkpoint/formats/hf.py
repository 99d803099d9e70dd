"""Hugging Face folders: InternLM v1 as `LlamaForCausalLM` with `attention_bias=true`.

Writes and reads `config.json`, `generation_config.json`, safetensors (sharded, with an index, where one file would be
too large) and the tokenizer's files. The names are one table, used in both directions; q, k and v are the three parts
of InternLM's packed matrix, and no rotary permutation is needed: both pair dimension j with j + d/2. What Llama
cannot express is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.spec import ModelArch, ParamSpec
from internlm_ds.checkpoint import diskfile, tensorfile
from internlm_ds.checkpoint.tensorfile import TensorReader, TensorSpec
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConversionError

MAX_SHARD_BYTES = 10 * 10**9
INDEX = "model.safetensors.index.json"
BOS, EOS, PAD = 1, 2, 2
_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "mixer.Wqkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mixer.Wqkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "mixer.out_proj.weight": ("self_attn.o_proj.weight",),
    "mixer.out_proj.bias": ("self_attn.o_proj.bias",),
    "norm1.weight": ("input_layernorm.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    "mlp.w1.weight": ("mlp.gate_proj.weight",),
    "mlp.w2.weight": ("mlp.down_proj.weight",),
    "mlp.w3.weight": ("mlp.up_proj.weight",),
}


@dataclass(frozen=True)
class _Target:
    """One tensor of the folder: part `part` of the `parts` equal blocks of rows of a blueprint parameter."""

    spec: TensorSpec
    source: str
    part: int
    parts: int


def names_of(spec: ParamSpec) -> tuple[str, ...]:
    """Names that a parameter has in a Llama folder: several if its parts lie apart there.

    >>> names_of(ParamSpec("blocks.3.mlp.w2.weight", (8, 16), "linear", layer=3))
    ('model.layers.3.mlp.down_proj.weight',)
    """
    if spec.layer is None:
        return (_TOP[spec.name],)
    rest = spec.name.removeprefix(f"blocks.{spec.layer}.")
    return tuple(f"model.layers.{spec.layer}.{name}" for name in _BLOCK[rest])


def check(model: ModelConfig, arch: ModelArch) -> None:
    """Raise `ConversionError` for a model that `LlamaForCausalLM` cannot express; all reasons are listed."""
    problems = []
    if arch.family != "internlm":
        problems.append(f"the family is {arch.family!r}; this version exports InternLM v1")
    if model.norm_type != "rmsnorm":
        problems.append(f"model.norm_type = {model.norm_type!r}: Llama has RMSNorm only")
    if not model.use_swiglu:
        problems.append("model.use_swiglu = False: Llama has a gated MLP only")
    if model.is_reward:
        problems.append("model.is_reward = True: a reward head is no language model's")
    if problems:
        raise ConversionError("this model has no Hugging Face form:\n  " + "\n  ".join(problems))


def config(model: ModelConfig, arch: ModelArch, *, dtype: torch.dtype, special: tuple[int, int, int]) -> dict[str, Any]:
    """`config.json` as transformers' `LlamaConfig` reads it; `special` are the ids of bos, eos and pad."""
    bos, eos, pad = special
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}} if model.use_dynamic_ntk_rope else {}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.mlp_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_kv_attention_heads,
        "head_dim": arch.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layer_norm_epsilon,
        "rope_theta": model.rope_base,
        **scaling,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


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
    check(model, arch)
    special = _write_tokenizer(folder, tokenizer) if tokenizer else (BOS, EOS, PAD)
    _write_json(folder / "config.json", config(model, arch, dtype=dtype, special=special))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(
        folder / "generation_config.json", {"_from_model_config": True, **dict(zip(names, special, strict=True))}
    )
    shards = list(_shards(_targets(arch, dtype=dtype), max_bytes=max_shard_bytes))
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _make(shard, weights)
        record = tensorfile.write_stream(folder / file, [t.spec for t in shard], tensors, metadata={"format": "pt"})
        placed |= {target.spec.name: file for target in shard}
        progress(f"wrote {file} ({record.size / 1e9:.2f} GB)")
    if len(shards) > 1:
        total = sum(target.spec.size for shard in shards for target in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _targets(arch: ModelArch, *, dtype: torch.dtype) -> Iterator[_Target]:
    for spec in arch.iter_params():
        names = names_of(spec)
        shape = (spec.shape[0] // len(names), *spec.shape[1:])
        for part, name in enumerate(names):
            yield _Target(TensorSpec(name, dtype, shape), spec.name, part, len(names))


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
        if target.source != source:
            source, whole = target.source, weights[target.source]
        yield whole.chunk(target.parts)[target.part].to(target.spec.dtype)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    diskfile.write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def _write_tokenizer(folder: Path, tokenizer: Path) -> tuple[int, int, int]:
    """Copy a sentencepiece model with what `LlamaTokenizer` needs beside it; returns the ids of bos, eos and pad."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(tokenizer))
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"tokenizer {tokenizer} is no sentencepiece model that can be read: {error}") from error
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    bos, eos = (i if i >= 0 else default for i, default in ((processor.bos_id(), BOS), (processor.eos_id(), EOS)))
    pieces = {"bos_token": bos, "eos_token": eos, "unk_token": processor.unk_id(), "pad_token": eos}
    special = {key: processor.IdToPiece(number) for key, number in pieces.items()}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        # the newer way of transformers puts a blank of its own in front of every text
        "legacy": True,
        **special,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)
    return bos, eos, eos


def read_weights(folder: str | Path, *, arch: ModelArch) -> Mapping[str, torch.Tensor]:
    """The weights of a Llama folder with attention biases under their logical names, read one at a time.

    Raises:
        CheckpointError: No safetensors there, or parameters that are missing, extra or of another shape (all listed).
    """
    folder = Path(folder)
    files = _locate(folder)
    reader = TensorReader(folder)
    wanted = {name: spec for spec in arch.iter_params() for name in names_of(spec)}
    problems = [f"{name}: missing" for name in wanted if name not in files]
    problems += [f"{name}: the model has no such parameter" for name in files if name not in wanted]
    for name, spec in wanted.items():
        shape = (spec.shape[0] // len(names_of(spec)), *spec.shape[1:])
        if name in files and (found := reader.shape(files[name], name)) != shape:
            problems.append(f"{name}: shape {list(found)} in the files, the model has {list(shape)}")
    if problems:
        raise CheckpointError(
            f"{folder} does not fit the model ({len(problems)} parameters):\n  " + "\n  ".join(problems)
        )
    return _HfWeights(arch, files, reader)


def _locate(folder: Path) -> dict[str, str]:
    """Tensor name to file."""
    if (folder / INDEX).exists():
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    files = sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors; that is the only Hugging Face form that is read")
    reader = TensorReader(folder)
    return {name: file for file in files for name in reader.names(file)}


class _HfWeights(Mapping[str, torch.Tensor]):
    def __init__(self, arch: ModelArch, files: Mapping[str, str], reader: TensorReader):
        self._names = {spec.name: names_of(spec) for spec in arch.iter_params()}
        self._files, self._reader = files, reader

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [self._reader.tensor(self._files[part], part) for part in self._names[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
