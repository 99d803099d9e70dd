"""From a native checkpoint and a prompt to a continuation: what `internlm-ds generate` does.

The model is built from the checkpoint's own `config.py` and filled with its weights; sampling is next door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from internlm_ds import arch as arches
from internlm_ds import config as configs
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.address import parse
from internlm_ds.checkpoint.formats import native
from internlm_ds.config.schema import Config
from internlm_ds.errors import CheckpointError, ConfigError, TokenizerError
from internlm_ds.generate.sampling import sample
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis
from internlm_ds.preprocess.tokenizers import Tokenizer


@dataclass(frozen=True)
class Settings:
    """How to continue a prompt; `seed` makes it repeatable."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1024


def generate(folder: str, *, tokenizer_path: str, prompt: str, settings: Settings) -> str:
    """The prompt and its continuation as text.

    Raises:
        CheckpointError, CheckpointDamagedError: There is no good native checkpoint.
        ConfigError: Its model is none that one process can generate with.
        TokenizerError: No tokenizer, or one that does not belong to the model; or the prompt has no tokens.
    """
    tokenizer = Tokenizer(tokenizer_path)
    model, arch = load_model(folder)
    ids = _prompt_ids(tokenizer, prompt, arch)
    new = sample(
        model,
        ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        generator=torch.Generator().manual_seed(settings.seed),
        stop_ids=_stop_ids(tokenizer),
        num_tokens=tokenizer.vocab_size,
    )
    return decode(tokenizer, [*ids, *new])


def load_model(folder: str, *, device: torch.device | str | None = None) -> tuple[LanguageModel, ModelArch]:
    """The model of a native checkpoint on one device (CUDA where there is one), in evaluation mode."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = native.open(_local_path(folder))
    config = _config_of(checkpoint)
    arch = arches.build(config)
    if arch is None or arch.family != "internlm":
        raise ConfigError(f"{folder}: generate cannot run model_type {config.model_type!r} yet; it runs INTERNLM")
    _require_same_model(checkpoint, arch)
    # the CPU has no fast half precision, and fp32 loses nothing
    dtype = getattr(torch, config.model.dtype) if device.type == "cuda" else torch.float32
    norm_dtype = torch.float32 if config.use_fp32_norm else None
    entries = build_layers(
        arch, config.model, tensor=Axis.single("tensor"), seed=None, dtype=dtype, norm_dtype=norm_dtype
    )
    model = LanguageModel(entries)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(checkpoint.weight(name))
    return model.to(device).eval(), arch


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids to text, control pieces left out."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=tokenizer.path).decode(ids)


def _local_path(folder: str) -> Path:
    address = parse(folder)
    if address.backend != "local":
        raise CheckpointError(f"{folder}: generate reads local folders only; copy the checkpoint to this machine first")
    return address.local_path


def _config_of(checkpoint: native.NativeCheckpoint) -> Config:
    loaded = configs.load(checkpoint.folder / native.CONFIG)
    if loaded.config is None or loaded.problems:
        raise ConfigError(loaded.problems, path=str(checkpoint.folder / native.CONFIG))
    return loaded.config


def _require_same_model(checkpoint: native.NativeCheckpoint, arch: ModelArch) -> None:
    """The blueprint that `config.py` gives has the parameters that are stored."""
    wanted, found = {spec.name: tuple(spec.shape) for spec in arch.iter_params()}, checkpoint.shapes
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{checkpoint.folder}: config.py and the weights differ in {len(different)} parameters, first in {name}: "
            f"{_shape(wanted.get(name))} by config.py, {_shape(found.get(name))} stored"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _prompt_ids(tokenizer: Tokenizer, prompt: str, arch: ModelArch) -> list[int]:
    if tokenizer.vocab_size > arch.vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model's vocabulary {arch.vocab_size}: "
            "give the tokenizer that its data was made with"
        )
    ids = tokenizer.encode([prompt])[0]
    if not ids:
        raise TokenizerError("the prompt has no tokens; give --prompt a text")
    return ids


def _stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return (tokenizer.eos_id,)
    except TokenizerError:
        return ()
