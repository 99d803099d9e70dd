"""The engine's weights and optimizer states by logical name, in and out.

A ZeRO rank holds slices of some parameters; `fragments` names each slice by parameter and position in the whole,
flattened parameter, which is what makes a checkpoint independent of the layout that wrote it. Both optimizer classes
keep the map from a parameter to its slice in `_hp_mapping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from internlm_ds.checkpoint.formats.native import Fragment
from internlm_ds.engine.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Master weights and moments of the slices this rank owns, 1-D fp32, one at a time.

    Before the first update there are no moments yet: they are zero, and written as such.
    """
    for name, _, mapping, flat in _slices(engine):
        start, address = mapping.lp_fragment_address.start, mapping.hp_fragment_address
        state = engine.optimizer.optimizer.state.get(flat, {})
        yield Fragment(name, "master", start, mapping.hp_fragment.detach())
        for kind in MOMENTS:
            moment = state.get(kind)
            if moment is None:
                yield Fragment(name, kind, start, torch.zeros_like(mapping.hp_fragment))
            else:
                yield Fragment(name, kind, start, moment.narrow(0, address.start, address.numel))


def num_updates(engine: Engine) -> int:
    """Adam's own count of updates."""
    for state in engine.optimizer.optimizer.state.values():
        return int(state["step"])
    return 0


@torch.no_grad()
def load_weights(engine: Engine, weight: Callable[[str], torch.Tensor]) -> None:
    """Fill this stage's parameters from `weight(logical name)`, in place; masters are not touched."""
    for name, param in engine.logical_parameters():
        param.data.copy_(weight(name).to(param.dtype))


@torch.no_grad()
def refresh_masters(engine: Engine, weight: Callable[[str], torch.Tensor] | None = None) -> None:
    """Make the fp32 masters equal the weights: after loading a model without its optimizer.

    Args:
        weight: Gives the whole fp32 value of a parameter; without it the (possibly half-precision) weights are taken.
    """
    for name, param, mapping, _ in _slices(engine):
        whole = (param.data if weight is None else weight(name)).flatten()
        address = mapping.lp_fragment_address
        mapping.hp_fragment.data.copy_(whole.narrow(0, address.start, address.numel))


@torch.no_grad()
def load_fragments(engine: Engine, fragment: Callable[[str, str, int, int], torch.Tensor], *, num_updates: int) -> None:
    """Fill masters and moments from `fragment(name, kind, start, numel)`.

    Args:
        num_updates: Adam's count; 0 leaves the moments to be made by the first update.
    """
    for name, _, mapping, flat in _slices(engine):
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        mapping.hp_fragment.data.copy_(fragment(name, "master", source.start, source.numel))
        if num_updates == 0:
            continue
        state = engine.optimizer.optimizer.state[flat]
        if not state:
            _new_adam_state(state, flat)
        for kind in MOMENTS:
            moment = fragment(name, kind, source.start, source.numel)
            state[kind].narrow(0, target.start, target.numel).copy_(moment)
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(num_updates)


def _new_adam_state(state: dict, flat: torch.Tensor) -> None:
    """The state that torch's AdamW makes at its first step."""
    state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    for kind in MOMENTS:
        state[kind] = torch.zeros_like(flat, memory_format=torch.preserve_format)


def _slices(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, object, torch.Tensor]]:
    """`(logical name, parameter, its mapping, the flat fp32 tensor its slice lies in)` of what this rank owns."""
    optimizer = engine.optimizer
    flats = (
        optimizer.fp32_groups_flat_partition
        if isinstance(optimizer, BF16_Optimizer)
        else optimizer.single_partition_of_fp32_groups
    )
    for name, param in engine.logical_parameters():
        mapping = getattr(param, "_hp_mapping", None)
        if mapping is not None:
            yield name, param, mapping, flats[mapping.param_group_index]
