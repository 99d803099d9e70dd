"""A checkpoint of any format as a conversion sees it: the model's settings, its blueprint, its weights one at a time.

Owns finding the settings: from the checkpoint itself (a manifest, `model_config.pt`), else from a configuration file.
Nothing stored in a checkpoint is executed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch import internlm as internlm_arch
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.formats import hf, internlm, native
from internlm_ds.checkpoint.search import Format, detect, find_checkpoints
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConfigError, ConversionError

_USUAL_KEYS = (
    *("num_chunks", "checkpoint", "embed_split_hidden", "embed_grad_scale", "parallel_output", "norm_type"),
    *("apply_post_layer_norm", "layer_norm_epsilon", "use_flash_attn", "vocab_size", "hidden_size"),
    *("num_attention_heads", "num_layers", "mlp_ratio"),
)
_OTHER_KEYS = (
    *("drop_rate", "attn_drop_rate", "residual_in_fp32", "use_scaled_init", "use_swiglu", "rope_base", "is_reward"),
    *("max_position_embeddings", "use_dynamic_ntk_rope", "dropout_selective_checkpoint"),
)


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert from.

    Attributes:
        weights: Whole parameters by logical name; each is read when it is asked for.
        dtype: Parameter dtype as stored.
        step: Successful updates, 0 where the format does not say.
        config_text: Text of the training configuration, "" where there is none.
    """

    folder: Path
    kind: Format
    model: ModelConfig
    arch: ModelArch
    weights: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    step: int = 0
    config_text: str = ""


def open_source(folder: Path, kind: Format, *, config: Path | None, mlp_names: str | None) -> Source:
    """Open a checkpoint for conversion.

    Args:
        config: A configuration whose `model` is used instead of the stored settings.
        mlp_names: See `internlm.read_weights`.
    Raises:
        CheckpointError: It does not exist, is damaged, or does not fit its model.
        ConversionError: Nothing says which model it is.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
    return _OPENERS[kind](folder, _model_of_config(config) if config else None, mlp_names)


def _open_native(folder: Path, model: ModelConfig | None, mlp_names: str | None) -> Source:
    if detect(folder) is None and (inside := find_checkpoints(folder)):
        names = ", ".join(str(c.path) for c in inside[:4])
        raise CheckpointError(f"{folder} is a folder of checkpoints; name one of them: {names}")
    checkpoint = native.open(folder)
    kind = checkpoint.manifest.model.get("model_type", "INTERNLM")
    if kind != "INTERNLM":
        raise ConversionError(f"{folder} holds a model of type {kind!r}; this version converts INTERNLM only")
    model = model or checkpoint.model_config or _unknown(folder)
    arch = internlm_arch.build(model)
    checkpoint.check_fits(arch)
    return Source(
        folder,
        "native",
        model,
        arch,
        checkpoint.weights,
        dtype=getattr(torch, checkpoint.dtype),
        step=checkpoint.step,
        config_text=checkpoint.config_text,
    )


def _open_internlm(folder: Path, model: ModelConfig | None, mlp_names: str | None) -> Source:
    if model is None:
        internlm.find_model_files(folder)
        model = model_of_dict(internlm.read_model_config(folder)) or _unknown(folder)
    arch = internlm_arch.build(model)
    weights = internlm.read_weights(folder, arch=arch, mlp_names=mlp_names)
    dtype = weights[next(iter(weights))].dtype
    return Source(folder, "internlm", model, arch, weights, dtype=dtype)


def _open_hf(folder: Path, model: ModelConfig | None, mlp_names: str | None) -> Source:
    if model is None:
        raise ConversionError(
            f"{folder}: give --config with the model's InternLM settings to read a Hugging Face folder"
        )
    arch = internlm_arch.build(model)
    weights = hf.read_weights(folder, arch=arch)
    return Source(folder, "hf", model, arch, weights, dtype=weights[next(iter(weights))].dtype)


_OPENERS: dict[Format, Callable[[Path, ModelConfig | None, str | None], Source]] = {
    "native": _open_native,
    "internlm": _open_internlm,
    "hf": _open_hf,
}


def _unknown(folder: Path) -> ModelConfig:
    raise ConversionError(
        f"{folder} does not say which model it holds; give --config CONFIG, a configuration of that model"
    )


def _model_of_config(path: Path) -> ModelConfig:
    from internlm_ds.config import load

    loaded = load(path)
    if loaded.problems:
        raise ConfigError(loaded.problems, path=loaded.path)
    if loaded.config.model_type != "INTERNLM":
        raise ConversionError(f"{path}: model_type = {loaded.config.model_type!r}; this version converts INTERNLM only")
    return loaded.config.model


def model_of_dict(settings: Mapping[str, Any]) -> ModelConfig | None:
    """The settings of InternLM's `model_config.pt`; keys that say nothing about weights are dropped, {} gives None."""
    if not settings:
        return None
    known = {field.name for field in fields(ModelConfig)} - {"extra", "given", "dtype", "checkpoint"}
    kept = {key: value for key, value in settings.items() if key in known and value is not None}
    dtype = str(settings.get("dtype", "float16")).removeprefix("torch.")
    return ModelConfig(**kept, dtype="float16" if dtype == "half" else dtype)


def dict_of_model(model: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The inverse of `model_of_dict`, with the keys that InternLM's builder takes."""
    default = ModelConfig()
    changed = {key for key in _OTHER_KEYS if getattr(model, key) != getattr(default, key)}
    return {**{key: getattr(model, key) for key in (*_USUAL_KEYS, *sorted(changed))}, "dtype": dtype}
