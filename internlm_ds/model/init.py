"""What parameters start with: a function of the seed and the parameter's logical name, of nothing else.

Whatever the number of stages, ranks or chunks, the same seed gives the same model. Whole tensors are drawn in fp32 on
the CPU, so devices and dtypes agree too; a rank keeps its slice. Standard deviations come from the blueprint
(`arch`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internlm_ds.arch.spec import ParamSpec
from internlm_ds.parallel.collectives import require_single
from internlm_ds.parallel.context import Axis


def stream_seed(seed: int, name: str) -> int:
    """The seed of one parameter's own random stream: 63 bits of SHA-256 over seed and name.

    >>> stream_seed(1024, "head.weight") == stream_seed(1024, "norm.weight")
    False
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def initial_value(spec: ParamSpec, seed: int) -> Tensor:
    """The whole parameter, fp32 on the CPU: normal with `spec.init_std`, or the constant `spec.init_value`."""
    value = torch.empty(spec.shape, dtype=torch.float32, device="cpu")
    if spec.init_std is None:
        return value.fill_(spec.init_value)
    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, spec.name))
    return value.normal_(0.0, spec.init_std, generator=generator)


def local_slice(whole: Tensor, spec: ParamSpec, tensor: Axis) -> Tensor:
    """This rank's part of a whole parameter.

    Raises:
        LayoutError: The axis has more than one rank.
    """
    assert tuple(whole.shape) == tuple(spec.shape), f"{spec.name}: {tuple(whole.shape)} is not {spec.shape}"
    require_single(tensor)
    return whole


def name_parameters(module: nn.Module, prefix: str, specs: Sequence[ParamSpec], tensor: Axis) -> None:
    """Write the blueprint's facts onto an entry's parameters: `logical_name`, and `tensor_model_parallel` on shards.

    The second is how DeepSpeed knows which parameters to count on every tensor rank when it takes the gradient norm.
    """
    by_name = {spec.name: spec for spec in specs if not (spec.on_first_tensor_rank_only and tensor.rank > 0)}
    found = {f"{prefix}.{local}": parameter for local, parameter in module.named_parameters()}
    assert found.keys() == by_name.keys(), f"module and blueprint differ in {sorted(found.keys() ^ by_name.keys())}"
    for name, parameter in found.items():
        parameter.logical_name = name
        if tensor.size > 1 and by_name[name].split_dim is not None:
            parameter.tensor_model_parallel = True


def fill(module: nn.Module, specs: Sequence[ParamSpec], *, seed: int, tensor: Axis) -> None:
    """Give every named parameter of an entry its initial value, in place and in its own dtype."""
    by_name = {spec.name: spec for spec in specs}
    with torch.no_grad():
        for parameter in module.parameters():
            spec = by_name[parameter.logical_name]
            parameter.copy_(local_slice(initial_value(spec, seed), spec, tensor))
