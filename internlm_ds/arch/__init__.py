"""Model families as data: `build` finds the blueprint of a configuration, `check` what its sizes rule out.

A family is a module here (`internlm`, `internlm2`, `llama`) that turns `ModelConfig` into a `ModelArch`. Mixtures of
experts, and model types that users register, have no blueprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from internlm_ds.arch import internlm, internlm2, llama
from internlm_ds.arch.parts import mlp_width
from internlm_ds.arch.spec import ModelArch
from internlm_ds.config.keys import MODEL_FAMILIES
from internlm_ds.config.schema import Config, ModelConfig
from internlm_ds.errors import Problem

_BUILDERS: dict[str, Callable[[ModelConfig], ModelArch]] = {
    "INTERNLM": internlm.build,
    "INTERNLM2_PUBLIC": internlm2.build,
    "LLAMA2": llama.build,
}
BLUEPRINTS = tuple(_BUILDERS)
"""Model types that have a blueprint."""

__all__ = ["BLUEPRINTS", "blueprint", "build", "check", "tensor_divisors"]


def build(config: Config) -> ModelArch | None:
    """The blueprint of a configuration's model; None for registered model types and families without one.

    The sizes must have passed `check`.
    """
    return blueprint(config.model_type, config.model)


def blueprint(model_type: str, model: ModelConfig) -> ModelArch | None:
    """The blueprint of a model type with these settings; None as for `build`."""
    builder = _BUILDERS.get(model_type)
    return builder(model) if builder is not None else None


def check(config: Config, *, line_of: Callable[[str], int | None]) -> list[Problem]:
    """What is wrong with the sizes of a model by itself, before any layout.

    Args:
        line_of: Line of a dotted key in the configuration, None where there is none.
    """
    model = config.model
    if config.model_type not in MODEL_FAMILIES:
        return []
    heads, kv_heads = model.num_attention_heads, model.num_kv_attention_heads
    found = []
    if model.hidden_size % heads:
        nearest = _nearest_divisors(model.hidden_size, heads)
        message = f"must divide model.hidden_size = {model.hidden_size}; nearest: {nearest}"
        found.append(Problem("model.num_attention_heads", message, heads, line_of("model.num_attention_heads")))
    elif (model.hidden_size // heads) % 2:
        message = f"makes heads of {model.hidden_size // heads} elements; rotary embedding needs an even number"
        found.append(Problem("model.num_attention_heads", message, heads, line_of("model.num_attention_heads")))
    if kv_heads is not None and heads % kv_heads:
        message = f"must divide model.num_attention_heads = {heads}; possible here: {_listed(_divisors(heads))}"
        found.append(
            Problem("model.num_kv_attention_heads", message, kv_heads, line_of("model.num_kv_attention_heads"))
        )
    return found


def tensor_divisors(config: Config) -> list[tuple[str, int]]:
    """Sizes that `parallel.tensor` must divide, with their names; none for registered model types.

    The vocabulary is not among them: its slices may differ in length.
    """
    model = config.model
    if config.model_type not in MODEL_FAMILIES:
        return []
    width = mlp_width(model)
    found = [("model.num_attention_heads", model.num_attention_heads)]
    if model.num_kv_attention_heads is not None:
        found.append(("model.num_kv_attention_heads", model.num_kv_attention_heads))
    found.append(("the MLP width", width))
    return found


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of a number just below and above another."""
    divisors = _divisors(number)
    below = [d for d in divisors if d < near][-1:]
    above = [d for d in divisors if d > near][:1]
    return " or ".join(map(str, below + above))


def _divisors(number: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return sorted({*small, *(number // k for k in small)})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
