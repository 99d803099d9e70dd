"""The engine's weights and optimizer states by logical name, in and out.

A ZeRO rank holds slices of some parameters; `fragments` names each slice by parameter and position in the whole,
flattened parameter, which is what makes a checkpoint independent of the layout that wrote it. A tensor rank holds
shards of some parameters; these go out as they are, with the description that `parallel.shards` reads, and come in cut
out of whole parameters or of the shards of any other layout. Both optimizer classes keep the map from a parameter to
its slice in `_hp_mapping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

from internlm_ds.checkpoint.formats.native import Fragment, NativeCheckpoint, Weight
from internlm_ds.checkpoint.manifest import key_of
from internlm_ds.engine.engine import Engine
from internlm_ds.engine.rounded_adam import MOMENTS, RoundedAdamW
from internlm_ds.engine.rounding import Piece
from internlm_ds.layout.shards import Shard
from internlm_ds.parallel.shards import shard_of_parameter, take

Whole = Callable[[str], torch.Tensor]


def weights(engine: Engine) -> Iterator[Weight]:
    """This stage's weights as this rank should write them: its shards, and on tensor rank 0 what is whole."""
    for name, param in engine.logical_parameters():
        if _speaks_for(engine, param):
            yield Weight(name, param.detach(), shard_of_parameter(param))


def fragments(engine: Engine) -> Iterator[Fragment]:
    """Master weights and moments of the slices this rank owns, 1-D, in the dtype they are kept in, one at a time.

    Tensor ranks that hold a parameter whole are equal: the first speaks for them.
    Before the first update there are no moments yet: they are zero, and written as such.
    """
    dtype = _moments_dtype(engine)
    for name, param, mapping, flat in _slices(engine):
        if not _speaks_for(engine, param):
            continue
        start, address, shard = (
            mapping.lp_fragment_address.start,
            mapping.hp_fragment_address,
            shard_of_parameter(param),
        )
        state = engine.optimizer.optimizer.state.get(flat, {})
        yield Fragment(name, "master", start, mapping.hp_fragment.detach(), shard)
        for kind in MOMENTS:
            moment = state.get(kind)
            if moment is None:
                yield Fragment(name, kind, start, torch.zeros_like(mapping.hp_fragment, dtype=dtype), shard)
            else:
                yield Fragment(name, kind, start, moment.narrow(0, address.start, address.numel), shard)


def saved_bytes(engine: Engine, *, weights: bool, fragments: bool) -> int:
    """What `weights` and `fragments` of this rank take, and a little more."""
    kept = (None, *(_moments_dtype(engine) for _ in MOMENTS))  # the master's is its own
    sizes = [p.numel() * p.element_size() for _, p in engine.logical_parameters() if _speaks_for(engine, p)]
    total = sum(sizes) + 64 * len(sizes) if weights else 0
    for _, param, mapping, _ in _slices(engine) if fragments else ():
        if _speaks_for(engine, param):
            master = mapping.hp_fragment
            total += sum(master.numel() * (dtype or master.dtype).itemsize + 64 for dtype in kept)
    return total


def _speaks_for(engine: Engine, param: torch.nn.Parameter) -> bool:
    return shard_of_parameter(param) is not None or engine.grid.get_slice_parallel_rank() == 0


def num_updates(engine: Engine) -> int:
    """Adam's own count of updates."""
    for state in engine.optimizer.optimizer.state.values():
        return int(state["step"])
    return 0


@torch.no_grad()
def load_weights(engine: Engine, source: NativeCheckpoint | Whole) -> None:
    """Fill this stage's parameters, in place; masters are not touched.

    Args:
        source: A checkpoint, of which only this rank's part is read, or a function from a logical name to the whole
            parameter.
    """
    read = _reader(source)
    for name, param in engine.logical_parameters():
        param.data.copy_(read(name, shard_of_parameter(param)).to(param.dtype))


@torch.no_grad()
def refresh_masters(engine: Engine, source: NativeCheckpoint | Whole | None = None) -> None:
    """Make the masters equal the weights: after loading a model without its optimizer.

    Args:
        source: As `load_weights`, so that more than half precision arrives; without it the weights are taken.
    """
    if engine.weights_are_masters:
        return
    read = None if source is None else _reader(source)
    for name, param, mapping, _ in _slices(engine):
        held = (param.data if read is None else read(name, shard_of_parameter(param))).flatten()
        address = mapping.lp_fragment_address
        mapping.hp_fragment.data.copy_(held.narrow(0, address.start, address.numel))


def _reader(source: NativeCheckpoint | Whole) -> Callable[[str, Shard | None], torch.Tensor]:
    if isinstance(source, NativeCheckpoint):
        return source.weight
    return lambda name, shard: take(source(name), shard)


@torch.no_grad()
def load_fragments(
    engine: Engine, fragment: Callable[[str, str, int, int, Shard | None], torch.Tensor], *, num_updates: int
) -> None:
    """Fill masters and moments, rounded to the nearest number where they are kept in bf16.

    Masters that are the weights themselves come with `load_weights`, to all ranks, and are left alone.

    Args:
        fragment: `fragment(name, kind, start, numel, shard)`: elements of the flattened shard, or whole parameter.
        num_updates: Adam's count; 0 leaves the moments to be made by the first update.
    """
    for name, param, mapping, flat in _slices(engine):
        shard = shard_of_parameter(param)
        source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
        if not engine.weights_are_masters:
            mapping.hp_fragment.data.copy_(fragment(name, "master", source.start, source.numel, shard))
        if num_updates == 0:
            continue
        state = engine.optimizer.optimizer.state[flat]
        if not state:
            state.update(_new_adam_state(engine, flat))
        for kind in MOMENTS:
            moment = fragment(name, kind, source.start, source.numel, shard)
            state[kind].narrow(0, target.start, target.numel).copy_(moment)
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(num_updates)


def pieces(engine: Engine) -> dict[torch.Tensor, list[Piece]]:
    """What each flat tensor of this rank's optimizer holds."""
    found: dict[torch.Tensor, list[Piece]] = {}
    for name, param, mapping, flat in _slices(engine):
        shard, source, target = shard_of_parameter(param), mapping.lp_fragment_address, mapping.hp_fragment_address
        key = key_of(name, None if shard is None else shard.rank)
        found.setdefault(flat, []).append(Piece(key, param.numel(), source.start, source.numel, target.start))
    return found


def _new_adam_state(engine: Engine, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state that the optimizer makes at its first step."""
    adam = engine.basic_optimizer
    if isinstance(adam, RoundedAdamW):
        return adam.new_state(flat)
    moments = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in MOMENTS}
    return {"step": torch.zeros((), dtype=torch.float32, device=flat.device), **moments}


def _moments_dtype(engine: Engine) -> torch.dtype:
    adam = engine.basic_optimizer
    return adam.moments_dtype if isinstance(adam, RoundedAdamW) else torch.float32


def _slices(engine: Engine) -> Iterator[tuple[str, torch.nn.Parameter, object, torch.Tensor]]:
    """`(logical name, parameter, its mapping, the flat tensor its slice lies in)` of what this rank owns."""
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
