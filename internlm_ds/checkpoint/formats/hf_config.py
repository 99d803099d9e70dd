"""`config.json` of a Hugging Face folder: written from a model's settings, and read into them.

Written for classes that transformers or a model's own code has: `LlamaForCausalLM` (InternLM v1 with `attention_bias`,
Llama), `InternLM2ForCausalLM`. Read: those, `InternLMForCausalLM` and `MistralForCausalLM`, which have Llama's names.
What a class cannot express, or we cannot, is refused; what makes no difference within the model's own length is a note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_ds.arch.parts import MLP_WIDTH_MULTIPLE, mlp_hidden_size
from internlm_ds.arch.spec import ModelArch
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConversionError

CONFIG = "config.json"
ARCHITECTURES = {"internlm": "LlamaForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
READ = ("LlamaForCausalLM", "InternLM2ForCausalLM", "InternLMForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class FolderModel:
    """What a folder's `config.json` says.

    Attributes:
        model_type, model: As a configuration of ours would.
        notes: What is left out, because it changes nothing up to the model's length.
        tied: The head is the embedding.
    """

    model_type: str
    model: ModelConfig
    notes: tuple[str, ...] = ()
    tied: bool = False


def check(model: ModelConfig, arch: ModelArch) -> None:
    """Raise `ConversionError` for a model that no class there can express; all reasons are listed."""
    problems = []
    if arch.family not in ARCHITECTURES:
        problems.append(f"the family is {arch.family!r}; those with such a form are {', '.join(ARCHITECTURES)}")
    if model.norm_type != "rmsnorm":
        problems.append(f"model.norm_type = {model.norm_type!r}: Llama and InternLM2 have RMSNorm only")
    if not model.use_swiglu:
        problems.append("model.use_swiglu = False: Llama and InternLM2 have a gated MLP only")
    if model.is_reward:
        problems.append("model.is_reward = True: a reward head is no language model's")
    if model.apply_post_layer_norm and arch.family != "internlm":
        problems.append("model.apply_post_layer_norm = True: Llama and InternLM2 have pre-norm blocks only")
    if problems:
        raise ConversionError("this model has no Hugging Face form:\n  " + "\n  ".join(problems))


def render(model: ModelConfig, arch: ModelArch, *, dtype: torch.dtype, special: tuple[int, int, int]) -> dict[str, Any]:
    """`config.json`; `special` are the ids of bos, eos and pad."""
    bos, eos, pad = special
    if arch.family == "internlm2":
        own: dict[str, Any] = {"model_type": "internlm2", "bias": not model.no_bias, "attn_implementation": "eager"}
        scaling: dict[str, Any] = {"type": "dynamic", "factor": 1.0}
    else:
        own = {
            "model_type": "llama",
            "head_dim": arch.head_dim,
            "attention_bias": arch.family == "internlm" or not model.no_bias,
            "attention_dropout": 0.0,
            "mlp_bias": False,
        }
        scaling = {"rope_type": "dynamic", "factor": 1.0}
    return {
        "architectures": [ARCHITECTURES[arch.family]],
        **own,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.mlp_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_kv_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layer_norm_epsilon,
        "rope_theta": model.rope_base,
        **({"rope_scaling": scaling} if model.use_dynamic_ntk_rope else {}),
        "tie_word_embeddings": False,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def read(folder: Path) -> FolderModel:
    """The model of a folder.

    A Llama with biases and as many key/value heads as heads is InternLM v1; every other Llama is `LLAMA2`, with rows as
    they lie there (`adapt_hf=True`).

    Raises:
        CheckpointError: There is no `config.json`, or it is no JSON object.
        ConversionError: A class or a setting that our models do not have; all of them are listed.
    """
    values = load(folder)
    problems = _problems(values)
    if problems:
        raise ConversionError(f"{folder / CONFIG} is of a model that cannot be taken over:\n  " + "\n  ".join(problems))
    kind = _architecture(values)
    heads = int(values["num_attention_heads"])
    groups = int(values.get("num_key_value_heads") or heads)
    bias = bool(values.get("attention_bias", values.get("bias", False)))
    if kind == "InternLM2ForCausalLM":
        model_type = "INTERNLM2_PUBLIC"
    else:
        is_v1 = kind != "MistralForCausalLM" and bias and groups == heads
        model_type = "INTERNLM" if is_v1 else "LLAMA2"
    grouped: dict[str, Any] = {"num_kv_attention_heads": groups, "no_bias": not bias, "adapt_hf": True}
    dynamic, notes = _rope(values, may_grow=model_type != "LLAMA2")
    if values.get("sliding_window") and values.get("use_sliding_window", True):
        notes.append(f"sliding_window = {values['sliding_window']} is left out: attention sees the whole sequence")
    width, hidden = int(values["intermediate_size"]), int(values["hidden_size"])
    ratio = _mlp_ratio(width, hidden)
    if width % MLP_WIDTH_MULTIPLE:
        padded = mlp_hidden_size(hidden, ratio)
        notes.append(f"the MLP of width {width} is filled up with zeros to {padded}: it computes and learns the same")
    model = ModelConfig(
        num_layers=int(values["num_hidden_layers"]),
        hidden_size=hidden,
        vocab_size=int(values["vocab_size"]),
        num_attention_heads=heads,
        mlp_ratio=ratio,
        layer_norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
        rope_base=_rope_base(values),
        max_position_embeddings=int(values.get("max_position_embeddings", 2048)),
        use_dynamic_ntk_rope=dynamic,
        dtype=_dtype(values),
        **({} if model_type == "INTERNLM" else grouped),
    )
    return FolderModel(model_type, model, tuple(notes), tied=is_tied(values))


def load(folder: Path) -> dict[str, Any]:
    """`config.json` as it stands, {} where there is none.

    Raises:
        CheckpointError: It is no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: an object was expected, found {type(values).__name__}")
    return values


def is_tied(values: Mapping[str, Any]) -> bool:
    """The head is the embedding."""
    return bool(values.get("tie_word_embeddings", False))


def _architecture(values: Mapping[str, Any]) -> str:
    named = values.get("architectures") or []
    kinds = {"llama": READ[0], "internlm2": READ[1], "internlm": READ[2], "mistral": READ[3]}
    return str(named[0]) if named else kinds.get(str(values.get("model_type")), str(values.get("model_type")))


def _problems(values: Mapping[str, Any]) -> list[str]:
    needed = ("num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    problems = [f"{key} is missing" for key in needed if not values.get(key)]
    kind = _architecture(values)
    if kind not in READ:
        problems.append(f"architectures = {kind!r}; read are {', '.join(READ)}")
    if problems:
        return problems
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        problems.append(f"hidden_act = {values['hidden_act']!r}: here it is silu")
    if values.get("mlp_bias"):
        problems.append("mlp_bias = true: MLPs have no biases here")
    if values["hidden_size"] % values["num_attention_heads"]:
        problems.append("hidden_size is no multiple of num_attention_heads")
    elif values.get("head_dim") not in (None, values["hidden_size"] // values["num_attention_heads"]):
        problems.append(f"head_dim = {values['head_dim']}: here it is hidden_size / num_attention_heads")
    if (kind_of_rope := _rope_kind(values)) not in ("default", "dynamic"):
        problems.append(f"rope_scaling of type {kind_of_rope!r}: only dynamic scaling is known here")
    return problems


def _rope_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of rotary embedding under any of their names: `rope_parameters`, `rope_scaling`, InternLM's `rotary`."""
    for key in ("rope_parameters", "rope_scaling", "rotary"):
        if isinstance(values.get(key), dict):
            return values[key]  # type: ignore[no-any-return]
    return {}


def _rope_kind(values: Mapping[str, Any]) -> str:
    found = _rope_settings(values)
    kind = str(found.get("rope_type", found.get("type", "default")))
    return "default" if kind == "origin" else kind


def _rope(values: Mapping[str, Any], *, may_grow: bool) -> tuple[bool, list[str]]:
    """Whether the base grows with the length, and what is left out."""
    if _rope_kind(values) != "dynamic":
        return False, []
    factor = float(_rope_settings(values).get("factor", 1.0))
    if factor == 1.0 and may_grow:
        return True, []
    length = values.get("max_position_embeddings", 2048)
    what = f"dynamic rope_scaling of factor {factor:g}"
    return False, [f"{what} is left out: nothing changes up to max_position_embeddings = {length}"]


def _rope_base(values: Mapping[str, Any]) -> float:
    found = _rope_settings(values)
    return float(values.get("rope_theta") or found.get("rope_theta") or found.get("base") or 10000.0)


def _mlp_ratio(width: int, hidden: int) -> float:
    """A ratio that gives the width, rounded up to a multiple of 256; InternLM's own, if that does.

    Source: InternEvo `transformers/revert_internlm.py`.
    """
    wanted = mlp_hidden_size(1, width)
    theirs = round((wanted - MLP_WIDTH_MULTIPLE + 1) / hidden + 0.01, 2)
    return theirs if theirs > 0 and mlp_hidden_size(hidden, theirs) == wanted else wanted / hidden


def _dtype(values: Mapping[str, Any]) -> str:
    name = str(values.get("torch_dtype") or values.get("dtype") or "float32").removeprefix("torch.")
    return name if name in ("float16", "bfloat16", "float32") else "float32"
