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

from internlm_ds.arch import BLUEPRINTS, blueprint
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.formats import hf, hf_config, internlm, llama, native
from internlm_ds.checkpoint.search import Format, detect, find_checkpoints
from internlm_ds.config.keys import MODEL_FAMILIES
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConfigError, ConversionError

_USUAL_KEYS = (
    *("num_chunks", "checkpoint", "embed_split_hidden", "embed_grad_scale", "parallel_output", "norm_type"),
    *("apply_post_layer_norm", "layer_norm_epsilon", "use_flash_attn", "vocab_size", "hidden_size"),
    *("num_attention_heads", "num_layers", "mlp_ratio"),
)
_GROUPED_KEYS = ("num_kv_attention_heads", "no_bias", "adapt_hf")
_OTHER_KEYS = (
    *("drop_rate", "attn_drop_rate", "residual_in_fp32", "use_scaled_init", "use_swiglu", "rope_base", "is_reward"),
    *("max_position_embeddings", "use_dynamic_ntk_rope", "dropout_selective_checkpoint", "norm_head", "init_type"),
    *("embedding_init_std", "attn_wqkv_init_std", "attn_other_init_std"),
    *("ffn_uplayer_init_std", "ffn_other_init_std", "out_head_init_std"),
)
Model = tuple[str, ModelConfig]
"""A model type and its settings."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert from.

    Attributes:
        model_type: `INTERNLM`, `INTERNLM2_PUBLIC` or `LLAMA2`.
        weights: Whole parameters by logical name; each is read when it is asked for.
        dtype: Parameter dtype as stored.
        step: Successful updates, 0 where the format does not say.
        config_text: Text of the training configuration, "" where there is none.
        notes: What the user should know: what is left out of the source.
    """

    folder: Path
    kind: Format
    model_type: str
    model: ModelConfig
    arch: ModelArch
    weights: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    step: int = 0
    config_text: str = ""
    notes: tuple[str, ...] = ()


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


def _open_native(folder: Path, given: Model | None, mlp_names: str | None) -> Source:
    if detect(folder) is None and (inside := find_checkpoints(folder)):
        names = ", ".join(str(c.path) for c in inside[:4])
        raise CheckpointError(f"{folder} is a folder of checkpoints; name one of them: {names}")
    checkpoint = native.open(folder)
    kind = checkpoint.manifest.model.get("model_type", "INTERNLM")
    if kind not in BLUEPRINTS:
        raise ConversionError(f"{folder} holds a model of type {kind!r}; known are {', '.join(BLUEPRINTS)}")
    if given is None:
        if checkpoint.model_config is None:
            raise _unknown(folder)
        given = (kind, checkpoint.model_config)
    arch = _arch(given)
    checkpoint.check_fits(arch)
    return Source(
        folder,
        "native",
        *given,
        arch,
        checkpoint.weights,
        dtype=getattr(torch, checkpoint.dtype),
        step=checkpoint.step,
        config_text=checkpoint.config_text,
    )


def _open_internlm(folder: Path, given: Model | None, mlp_names: str | None) -> Source:
    if given is None:
        kind = internlm.model_type_of(folder)
        stored = internlm.read_model_config(folder)
        model = model_of_dict(stored)
        if kind is None or model is None:
            raise _unknown(folder)
        given = (stored.get("model_type", kind), model)
    arch = _arch(given)
    weights = internlm.read_weights(folder, arch=arch, mlp_names=mlp_names)
    dtype = weights.dtype(next(iter(weights)))
    return Source(folder, "internlm", *given, arch, weights, dtype=dtype)


def _open_hf(folder: Path, given: Model | None, mlp_names: str | None) -> Source:
    notes: tuple[str, ...] = ()
    if given is None:
        found = hf_config.read(folder)
        given, notes = (found.model_type, found.model), found.notes
    arch = _arch(given)
    weights = hf.read_weights(folder, arch=arch)
    return Source(folder, "hf", *given, arch, weights, dtype=weights.dtype(next(iter(weights))), notes=notes)


def _arch(given: Model) -> ModelArch:
    arch = blueprint(*given)
    if arch is None:
        raise ConversionError(
            f"model_type = {given[0]!r} has no table of parameters; known are {', '.join(BLUEPRINTS)}"
        )
    return arch


def _open_llama(folder: Path, given: Model | None, mlp_names: str | None) -> Source:
    if given is None:
        raise _unknown(folder)
    arch = _arch(given)
    weights = llama.read_weights(folder, arch=arch)
    return Source(folder, "llama", *given, arch, weights, dtype=weights.dtype(next(iter(weights))))


_OPENERS: dict[Format, Callable[[Path, Model | None, str | None], Source]] = {
    "native": _open_native,
    "internlm": _open_internlm,
    "llama": _open_llama,
    "hf": _open_hf,
}


def _unknown(folder: Path) -> ConversionError:
    return ConversionError(
        f"{folder} does not say which model it holds; give --config CONFIG, a configuration of that model"
    )


def _model_of_config(path: Path) -> Model:
    from internlm_ds.config import load

    loaded = load(path)
    if loaded.problems:
        raise ConfigError(loaded.problems, path=loaded.path)
    return loaded.config.model_type, loaded.config.model


def model_of_dict(settings: Mapping[str, Any]) -> ModelConfig | None:
    """The settings of InternLM's `model_config.pt`; keys that say nothing about weights are dropped, {} gives None."""
    if not settings:
        return None
    known = {field.name for field in fields(ModelConfig)} - {"extra", "given", "dtype", "checkpoint"}
    kept = {key: value for key, value in settings.items() if key in known and value is not None}
    dtype = str(settings.get("dtype", "float16")).removeprefix("torch.")
    return ModelConfig(**kept, dtype="float16" if dtype == "half" else dtype)


def dict_of_model(model: ModelConfig, *, dtype: torch.dtype, model_type: str = "INTERNLM") -> dict[str, Any]:
    """The inverse of `model_of_dict`, with the keys that InternLM's builder of this model type takes."""
    default = ModelConfig()
    takes = MODEL_FAMILIES[model_type]
    changed = {key for key in _OTHER_KEYS if getattr(model, key) != getattr(default, key) and key in takes}
    grouped = () if model_type == "INTERNLM" else _GROUPED_KEYS
    keys = (*_USUAL_KEYS, *grouped, *sorted(changed))
    return {**{key: value for key in keys if (value := getattr(model, key)) is not None}, "dtype": dtype}
