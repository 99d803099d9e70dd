"""A model as one list of layer entries, from which a pipeline stage builds its part and one process builds all.

An entry knows its blueprint and builds its module when asked, on the stage that needs it. Parameters come out named
(`logical_name`) and filled. Which stage gets which entries, and how they are trained, is `engine`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from internlm_ds.arch.spec import LayerSpec, ModelArch
from internlm_ds.attention.kernels import Attend
from internlm_ds.attention.select import attention_function
from internlm_ds.config.schema import ModelConfig
from internlm_ds.errors import ConfigError
from internlm_ds.layout.loss_chunks import Setting
from internlm_ds.layout.shards import shard_of
from internlm_ds.model import block, init
from internlm_ds.model.mlp import GeluMlp, SwigluMlp
from internlm_ds.model.norm import build_norm
from internlm_ds.model.rotary import Rotary
from internlm_ds.model.self_attention import GroupedAttention, PackedAttention, SelfAttention, SeparateAttention
from internlm_ds.parallel.context import Axis


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the list.

    Attributes:
        prefix: Logical prefix of its parameters, `blocks.3`.
        spec: Its blueprint; None for a module that a user brought.
        build: `build(recompute) -> nn.Module`, on the CPU. `recompute` is for blocks; the others ignore it.
    """

    prefix: str
    spec: LayerSpec | None
    build: Callable[[bool], nn.Module]

    @property
    def is_block(self) -> bool:
        return self.spec is not None and self.spec.kind == "block"


def build_layers(
    arch: ModelArch,
    model: ModelConfig,
    *,
    tensor: Axis,
    seed: int | None,
    dtype: torch.dtype,
    attention: str | Attend = "auto",
    norm_dtype: torch.dtype | None = None,
    sequence_parallel: bool = False,
    chunked_loss: Setting = False,
) -> list[LayerEntry]:
    """The layers of `arch` in order of computation.

    Args:
        arch: The blueprint.
        model: Everything that is not in it: rotary base, dropout, norm type, ….
        tensor: The axis that layers are split over.
        seed: Of the initial values; None leaves parameters uninitialised, for a checkpoint that fills all of them.
        dtype: Of parameters and activations.
        attention: A backend's function, or the name of one to be chosen at the first call: `auto`, `flash`, `varlen`,
            `sdpa` or `reference`.
        norm_dtype: Of norm parameters; `dtype` when None, fp32 for `use_fp32_norm`.
        sequence_parallel: Between tensor regions a rank has its share of the tokens, which must divide by the axis.
        chunked_loss: The head may leave its product to the loss (`PendingLogits`); for who trains with `model.loss`.
    Raises:
        ConfigError: A switch that this family does not know.
        LayoutError: A size that does not divide over `tensor`.
    """
    if arch.family not in _ATTENTION:
        raise ConfigError(f"model family {arch.family!r} has no layers; there are {', '.join(_ATTENTION)}")
    if model.apply_post_layer_norm and arch.family == "internlm":
        raise ConfigError("model.apply_post_layer_norm = True: InternLM v1 has pre-norm blocks only; use False")
    attend = attention
    if isinstance(attend, str):
        attend = attention_function(attend, use_flash_attn=model.use_flash_attn)
    parts = _Parts(arch, model, tensor, dtype, norm_dtype, attend, sequence_parallel and tensor.size > 1, chunked_loss)
    for spec in arch.iter_params():
        shard_of(spec, size=tensor.size, rank=tensor.rank)  # raises where it does not divide, before anything is built
    return [LayerEntry(spec.prefix, spec, partial(_build, parts, spec, seed)) for spec in arch.layers]


def num_recomputed(num_blocks: int, fraction: float) -> int:
    """How many blocks of a stage (or chunk), from its first on, are recomputed: `int(num_blocks * checkpoint)`.

    >>> num_recomputed(5, 0.5)
    2
    """
    return int(num_blocks * fraction)


def build_modules(entries: Sequence[LayerEntry], *, recompute: float = 0.0) -> list[nn.Module]:
    """The modules of one stage: its first `int(blocks * recompute)` blocks recompute their activations."""
    remaining = num_recomputed(sum(entry.is_block for entry in entries), recompute)
    modules = []
    for entry in entries:
        modules.append(entry.build(entry.is_block and remaining > 0))
        remaining -= entry.is_block
    return modules


class LanguageModel(nn.Module):
    """All layers of one process, without a pipeline."""

    def __init__(self, entries: Sequence[LayerEntry], *, recompute: float = 0.0):
        super().__init__()
        self.layers = nn.ModuleList(build_modules(entries, recompute=recompute))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """tokens int64 `(T,)`, cu_seqlens int32 `(S + 1,)` -> logits `(T, V)`, or this tensor rank's `(T, v)`."""
        carried: Tensor | tuple[Tensor, Tensor] = (tokens, cu_seqlens)
        for layer in self.layers:
            carried = layer(carried)
        assert isinstance(carried, Tensor), "the last layer returns logits alone"
        return carried

    def named_logical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the names that checkpoints use."""
        for parameter in self.parameters():
            yield parameter.logical_name, parameter


_ATTENTION: dict[str, type[SelfAttention]] = {
    "internlm": PackedAttention,
    "internlm2": GroupedAttention,
    "llama": SeparateAttention,
}


@dataclass(frozen=True)
class _Parts:
    """What all layers of a model are built from."""

    arch: ModelArch
    model: ModelConfig
    tensor: Axis
    dtype: torch.dtype
    norm_dtype: torch.dtype | None
    attend: Attend
    sequence_parallel: bool
    chunked_loss: Setting

    def embedding(self) -> nn.Module:
        model = self.model
        split_hidden = model.embed_split_hidden or not model.use_flash_attn
        entry = block.HiddenSplitEmbeddingEntry if split_hidden else block.VocabSplitEmbeddingEntry
        sizes = (self.arch.vocab_size, self.arch.hidden_size)
        return entry(
            *sizes,
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            grad_scale=model.embed_grad_scale,
            dtype=self.dtype,
        )

    def block(self, recompute: bool) -> nn.Module:
        model, arch = self.model, self.arch
        mixer = _ATTENTION[arch.family](
            arch.hidden_size,
            arch.num_attention_heads,
            arch.num_kv_attention_heads,
            rotary=self.rotary(),
            attend=self.attend,
            tensor=self.tensor,
            bias=not model.no_bias,
            sequence_parallel=self.sequence_parallel,
            dropout=model.attn_drop_rate,
            dtype=self.dtype,
        )
        mlp = (SwigluMlp if model.use_swiglu else GeluMlp)(
            arch.hidden_size,
            arch.mlp_hidden_size,
            tensor=self.tensor,
            sequence_parallel=self.sequence_parallel,
            dtype=self.dtype,
        )
        return self._block_class()(
            mixer,
            mlp,
            self.norm(),
            self.norm(),
            drop_rate=model.drop_rate,
            residual_in_fp32=model.residual_in_fp32,
            recompute=recompute,
            # RMSNorm keeps its input alone: without dropout there is nothing to forget
            recompute_norms=model.dropout_selective_checkpoint
            and (model.drop_rate > 0 or model.norm_type != "rmsnorm"),
        )

    def _block_class(self) -> type[block.Block]:
        if self.arch.family == "internlm":
            return block.Block
        return block.PostNormBlock if self.model.apply_post_layer_norm else block.PreNormBlock

    def rotary(self) -> Rotary:
        model = self.model
        return Rotary(
            self.arch.head_dim,
            base=model.rope_base,
            max_position_embeddings=model.max_position_embeddings,
            dynamic_ntk=model.use_dynamic_ntk_rope,
            neighbours=self.arch.rotary_pairs == "neighbours",
        )

    def norm(self, *, final: bool = False) -> nn.Module:
        return build_norm(
            self.model.norm_type,
            self.arch.hidden_size,
            eps=self.model.layer_norm_epsilon,
            dtype=self.dtype,
            weight_dtype=self.norm_dtype,
            classes=(block.RmsNormEntry, block.LayerNormEntry) if final else None,
        )

    def head(self, num_outputs: int) -> nn.Module:
        entry = block.NormHeadEntry if self.model.norm_head else block.HeadEntry
        head = entry(
            self.arch.hidden_size,
            num_outputs,
            tensor=self.tensor,
            bias=False,
            gather_output=not self.model.parallel_output,
            sequence_parallel=self.sequence_parallel,
            uneven=True,
            weight_scale=self.model.embed_grad_scale,
            dtype=self.dtype,
        )
        head.chunked_loss = self.chunked_loss
        return head


def _build(parts: _Parts, spec: LayerSpec, seed: int | None, recompute: bool) -> nn.Module:
    if spec.kind == "embedding":
        module = parts.embedding()
    elif spec.kind == "block":
        module = parts.block(recompute)
    elif spec.kind == "norm":
        module = parts.norm(final=True)
    else:
        module = parts.head(spec.params[0].shape[0])
    init.name_parameters(
        module, spec.prefix, spec.params, tensor=parts.tensor, sequence_parallel=parts.sequence_parallel
    )
    if seed is not None:
        init.fill(module, spec.params, seed=seed)
    return module
