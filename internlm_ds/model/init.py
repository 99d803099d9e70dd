"""What parameters start with: a function of the seed and the parameter's logical name, of nothing else.

Whatever the number of stages, ranks or chunks, the same seed gives the same model. Whole tensors are drawn in fp32 on
the CPU, so devices and dtypes agree too; a rank keeps its slice. Standard deviations come from the blueprint
(`arch`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.layout.shards import holds, shard_of
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.shards import shard_of_parameter, take


def stream_seed(seed: int, name: str) -> int:
    """The seed of one parameter's own random stream: 63 bits of SHA-256 over seed and name.

    >>> stream_seed(1024, "head.weight") == stream_seed(1024, "norm.weight")
    False
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def initial_value(spec: ParamSpec, seed: int) -> Tensor:
    """The whole parameter, fp32 on the CPU: drawn with standard deviation `spec.init_std`, or `spec.init_value`.

    A uniform distribution over [-b, b] has the standard deviation b/sqrt(3).
    """
    value = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    if spec.init_std is None:
        return value.fill_(spec.init_value)
    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, spec.name))
    if spec.init_uniform:
        bound = math.sqrt(3) * spec.init_std
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(0.0, spec.init_std, generator=generator)


def name_parameters(
    module: nn.Module, prefix: str, specs: Sequence[ParamSpec], *, tensor: Axis, sequence_parallel: bool = False
) -> None:
    """Write the blueprint's facts onto an entry's parameters.

    * `logical_name`, which checkpoints use;
    * `tensor_shard` on shards: the part of the whole that this rank holds;
    * `tensor_model_parallel` on shards: DeepSpeed counts these on every tensor rank when it takes the gradient norm;
    * `sequence_parallel` on what every rank holds whole but sees its own tokens with: gradients are to be summed.
    """
    by_name = {spec.name: spec for spec in specs if holds(spec, rank=tensor.rank)}
    found = {f"{prefix}.{local}": parameter for local, parameter in module.named_parameters()}
    assert found.keys() == by_name.keys(), f"module and blueprint differ in {sorted(found.keys() ^ by_name.keys())}"
    for name, parameter in found.items():
        spec = by_name[name]
        parameter.logical_name = name
        shard = shard_of(spec, size=tensor.size, rank=tensor.rank)
        shape = tuple(spec.shape) if shard is None else shard.shape(spec.shape)
        assert tuple(parameter.shape) == shape, f"{name}: module has {tuple(parameter.shape)}, blueprint {shape}"
        if shard is not None:
            parameter.tensor_shard, parameter.tensor_model_parallel = shard, True
        elif sequence_parallel and not spec.on_first_tensor_rank_only:
            parameter.sequence_parallel = True


def fill(module: nn.Module, specs: Sequence[ParamSpec], *, seed: int) -> None:
    """Give every named parameter of an entry its initial value, in place and in its own dtype; a shard its part."""
    by_name = {spec.name: spec for spec in specs}
    with torch.no_grad():
        for parameter in module.parameters():
            spec = by_name[parameter.logical_name]
            parameter.copy_(take(initial_value(spec, seed), shard_of_parameter(parameter)))
