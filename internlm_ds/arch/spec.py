"""The blueprint: what a model consists of, as data, before any tensor exists.

Model, plan, checkpoint and convert all read the same table, so a parameter has one name, one shape and one way to be
split in the whole house. Logical names are InternLM's, with the layer numbers of the whole model.

Shapes are whole (before any split over tensor ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["embedding", "head", "linear", "bias", "norm"]


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model.

    Attributes:
        name: Logical name, e.g. `blocks.3.mixer.Wqkv.weight`.
        shape: Whole shape.
        kind: What it is; norms and biases are recognised by it.
        init_std: Standard deviation of the normal it is drawn from; None for a constant.
        init_uniform: Drawn from the uniform distribution of that standard deviation instead (`init_type`).
        init_value: The constant when `init_std` is None.
        split_dim: Dimension split over tensor ranks, None when every rank holds it whole.
        parts: Number of equal blocks along `split_dim` that are each split over tensor ranks (3 for a packed
            `[q; k; v]`, 1 for a plain matrix): rank r owns the r-th slice of every block.
        granule: Elements along `split_dim` (within one part) that must stay on one rank, e.g. a head's width.
        uneven: Tensor ranks may hold slices of different lengths along `split_dim`: a vocabulary need not divide.
        on_first_tensor_rank_only: The bias that is added once, after a row-parallel product: tensor rank 0 owns it.
        layer: Global layer number for block parameters, None otherwise.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    init_std: float | None = None
    init_value: float = 0.0
    split_dim: int | None = None
    parts: int = 1
    granule: int = 1
    uneven: bool = False
    on_first_tensor_rank_only: bool = False
    layer: int | None = None
    init_uniform: bool = False

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the layer list: what a pipeline stage is made of.

    `prefix` + "." + the name inside the module is the logical parameter name (`blocks.3` + `.norm1.weight`).
    """

    kind: Literal["embedding", "block", "norm", "head"]
    prefix: str
    params: tuple[ParamSpec, ...]
    layer: int | None = None


@dataclass(frozen=True)
class ModelArch:
    """A model family with its sizes filled in.

    Attributes:
        family: `internlm` (version 1), `internlm2` or `llama`.
        layers: Embedding, blocks 0 … L-1, final norm (if any), head, in order of computation.
        rotary_pairs: Which elements of a head are rotated together, as the rows of q and k lie: j and j + d/2
            (`halves`), or 2j and 2j + 1 (`neighbours`, that is `adapt_hf=False`).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_attention_heads: int
    head_dim: int
    mlp_hidden_size: int
    layers: tuple[LayerSpec, ...]
    rotary_pairs: Literal["halves", "neighbours"] = "halves"

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        return tuple(self.iter_params())

    def iter_params(self) -> Iterator[ParamSpec]:
        for layer in self.layers:
            yield from layer.params

    @property
    def num_params(self) -> int:
        return sum(p.numel for p in self.iter_params())
