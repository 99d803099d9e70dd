"""From a native checkpoint and a prompt to a continuation: what `internlm-ds generate` does.

The model is built from the settings that lie in the checkpoint and filled with its weights; sampling is next door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from internlm_ds import config as configs
from internlm_ds.arch import internlm
from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.address import parse
from internlm_ds.checkpoint.formats import native
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import CheckpointError, ConfigError, TokenizerError
from internlm_ds.generate.sampling import sample
from internlm_ds.model.layers import LanguageModel, build_layers
from internlm_ds.parallel.context import Axis
from internlm_ds.preprocess.tokenizers import Tokenizer, open_tokenizer


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
    tokenizer = open_tokenizer(tokenizer_path)
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
    return tokenizer.decode([*ids, *new])


def load_model(folder: str, *, device: torch.device | str | None = None) -> tuple[LanguageModel, ModelArch]:
    """The model of a native checkpoint on one device (CUDA where there is one), in evaluation mode.

    Raises:
        CheckpointError, CheckpointDamagedError, ConfigError: As `generate`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = native.open(_local_path(folder))
    config = _model_of(checkpoint)
    arch = internlm.build(config)
    checkpoint.check_fits(arch)
    # the CPU has no fast half precision, and fp32 loses nothing
    dtype = getattr(torch, checkpoint.dtype) if device.type == "cuda" else torch.float32
    entries = build_layers(
        arch, config, tensor=Axis.single("tensor"), seed=None, dtype=dtype, norm_dtype=_norm_dtype(checkpoint, arch)
    )
    model = LanguageModel(entries)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(checkpoint.weight(name))
    return model.to(device).eval(), arch


def _local_path(folder: str) -> Path:
    address = parse(folder)
    if address.backend != "local":
        raise CheckpointError(f"{folder}: generate reads local folders only; copy the checkpoint to this machine first")
    return address.local_path


def _model_of(checkpoint: native.NativeCheckpoint) -> ModelConfig:
    """The model's settings: from the manifest, else from the configuration file in the checkpoint."""
    model_type, model = checkpoint.manifest.model.get("model_type", "INTERNLM"), checkpoint.model_config
    if model is None:
        loaded = configs.load(checkpoint.folder / native.CONFIG)
        if loaded.config is None or loaded.problems:
            raise ConfigError(loaded.problems, path=str(checkpoint.folder / native.CONFIG))
        model_type, model = loaded.config.model_type, loaded.config.model
    if model_type != "INTERNLM":
        raise ConfigError(f"{checkpoint.folder}: generate cannot run model_type {model_type!r} yet; it runs INTERNLM")
    return model


def _norm_dtype(checkpoint: native.NativeCheckpoint, arch: ModelArch) -> torch.dtype | None:
    """fp32 where the run kept its norms so (`use_fp32_norm`)."""
    norms = {spec.name for spec in arch.iter_params() if spec.kind == "norm"}
    stored = {p.dtype for p in checkpoint.manifest.parameters if p.name in norms}
    return torch.float32 if stored == {"float32"} else None


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
