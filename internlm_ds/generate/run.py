"""From a checkpoint of any format and a prompt to a continuation: what `internlm-ds generate` does.

The model is built from the settings that lie in the checkpoint and filled with its weights; sampling and chat prompts
are next door.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.place import localized
from internlm_ds.checkpoint.search import detect
from internlm_ds.convert.sources import Source, open_source
from internlm_ds.errors import TokenizerError
from internlm_ds.generate.chat import Chat, question
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


def generate(
    folder: str,
    *,
    tokenizer_path: str,
    prompt: str,
    settings: Settings,
    chat: Chat | None = None,
    config: Path | None = None,
) -> str:
    """The prompt and its continuation as text; with `chat` the answer alone.

    Args:
        config: Configuration of the model, where the checkpoint does not say which it is.
    Raises:
        CheckpointError, CheckpointDamagedError: There is no good checkpoint.
        ConfigError, ConversionError: Its model is none that one process can generate with.
        TokenizerError: No tokenizer, or one that does not belong to the model; or the prompt has no tokens.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    source = open_checkpoint(folder, config=config)
    _check_vocabulary(tokenizer, source.arch)
    ids, ends = question(prompt, chat, tokenizer) if chat else (_prompt_ids(tokenizer, prompt), ())
    new = sample(
        build_model(source),
        ids,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        generator=torch.Generator().manual_seed(settings.seed),
        stop_ids=(*ends, *_eos(tokenizer)),
        num_tokens=tokenizer.vocab_size,
    )
    return tokenizer.decode(list(new) if chat else [*ids, *new])


def load_model(
    folder: str, *, device: torch.device | str | None = None, config: Path | None = None
) -> tuple[LanguageModel, ModelArch]:
    """The model of a checkpoint on one device (CUDA where there is one), in evaluation mode.

    Raises:
        CheckpointError, CheckpointDamagedError, ConfigError, ConversionError: As `generate`.
    """
    source = open_checkpoint(folder, config=config)
    return build_model(source, device=device), source.arch


def open_checkpoint(folder: str, *, config: Path | None = None) -> Source:
    """A checkpoint folder of whatever format."""
    path = localized(folder)
    return open_source(path, detect(path) or "native", config=config, mlp_names=None)


def build_model(source: Source, *, device: torch.device | str | None = None) -> LanguageModel:
    """The model with its weights on one device, in evaluation mode."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # the CPU has no fast half precision, and fp32 loses nothing
    dtype = source.dtype if device.type == "cuda" else torch.float32
    axis, norm_dtype = Axis.single("tensor"), _norm_dtype(source)
    entries = build_layers(source.arch, source.model, tensor=axis, seed=None, dtype=dtype, norm_dtype=norm_dtype)
    model = LanguageModel(entries)
    with torch.no_grad():
        for name, parameter in model.named_logical_parameters():
            parameter.copy_(source.weights[name])
    return model.to(device).eval()


def _norm_dtype(source: Source) -> torch.dtype | None:
    """fp32 where the run kept its norms so (`use_fp32_norm`)."""
    norm = next(spec.name for spec in source.arch.iter_params() if spec.kind == "norm")
    return torch.float32 if source.weights[norm].dtype == torch.float32 else None


def _check_vocabulary(tokenizer: Tokenizer, arch: ModelArch) -> None:
    if tokenizer.vocab_size > arch.vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model's vocabulary {arch.vocab_size}: "
            "give the tokenizer that its data was made with"
        )


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode([prompt])[0]
    if not ids:
        raise TokenizerError("the prompt has no tokens; give --prompt a text")
    return ids


def _eos(tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return (tokenizer.eos_id,)
    except TokenizerError:
        return ()
