"""The transformer blocks, and the other entries of the layer list as a pipeline stage calls them.

Every entry takes and returns what a stage passes on: one tuple `(hidden, cu_seqlens)`. The embedding starts with
tokens in the place of `hidden`, the head ends with logits alone. Sub-modules carry InternLM's names. What they are
built from is `layers`' business, what their parameters start with `init`'s. In training the head may leave its product
to the loss, which computes it in chunks.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize
from torch.utils.checkpoint import checkpoint

from internlm_ds.attention.segments import Segments
from internlm_ds.layout.loss_chunks import Setting, is_chunked
from internlm_ds.model.norm import LayerNorm, RmsNorm
from internlm_ds.model.rotary import Tables
from internlm_ds.model.self_attention import KeyValueCache, SelfAttention
from internlm_ds.parallel.collectives import enter_region
from internlm_ds.parallel.embedding import HiddenSplitEmbedding, VocabSplitEmbedding
from internlm_ds.parallel.linear import ColumnParallelLinear
from internlm_ds.parallel.linear_cross_entropy import PendingLogits

Carried = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Pre-norm block: h = x + mixer(norm1(x)), out = h + mlp(norm2(h)); dropout on x and on the mixer's output.

    Sub-modules are called `mixer`, `norm1`, `norm2`, `mlp`, as in InternLM v1, or as `NAMES` of a sub-class says.

    Args:
        mixer, mlp, norm1, norm2: The parts.
        drop_rate: Dropout probability of the residual stream's inputs.
        residual_in_fp32: Keep the residual stream in fp32 from this block on.
        recompute: Forget the activations in training and compute them again in the backward pass.
        recompute_norms: Without `recompute`, do so for dropout and norms alone (`dropout_selective_checkpoint`): their
            fp32 copies of the residual stream are large and cheap to make again.
    """

    NAMES = ("mixer", "norm1", "norm2", "mlp")

    # given by the engine: runs a block's tensor work as compiled code (`model.compiled`)
    compiled: Callable[[Block, Tensor, Segments], Tensor] | None = None

    def __init__(
        self,
        mixer: SelfAttention,
        mlp: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        *,
        drop_rate: float = 0.0,
        residual_in_fp32: bool = False,
        recompute: bool = False,
        recompute_norms: bool = False,
    ):
        super().__init__()
        for name, part in zip(self.NAMES, (mixer, norm1, norm2, mlp), strict=True):
            self.add_module(name, part)
        self.drop_rate, self.residual_in_fp32 = drop_rate, residual_in_fp32
        self.recompute, self.recompute_norms = recompute, recompute_norms and not recompute

    def forward(self, carried: Carried) -> Carried:
        hidden, cu_seqlens = carried
        run = self._recomputed if self.recompute else _as_is
        return run(self._packed, hidden, cu_seqlens), cu_seqlens

    def extend(self, hidden: Tensor, cache: KeyValueCache) -> Tensor:
        """The next t tokens of one sequence, `(t, H) -> (t, H)`; for generation."""
        residual, x = self._enter(hidden)
        return self._leave(residual, self.mixer.extend(x, cache))

    def _packed(self, hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        segments = Segments.of(cu_seqlens)
        if self.compiled is not None:
            return self.compiled(self, hidden, segments)
        residual, x = self._enter(hidden)
        return self._leave(residual, self.mixer(x, segments))

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the mixer gets."""
        run = self._recomputed if self.recompute_norms else _as_is
        return run(self._enter_mixer, x)

    def _leave(self, residual: Tensor, mixed: Tensor) -> Tensor:
        """The block's output from what the mixer made."""
        run = self._recomputed if self.recompute_norms else _as_is
        residual, x = run(self._enter_mlp, self._residual(residual), mixed)
        return self.mlp(x) + self._residual(residual)

    def before_attention(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Residual stream, rotated queries and keys, values: all of `forward` before the segments matter."""
        residual, x = self._enter(x)
        return residual, *self.mixer.project(x, lambda dtype: tables)

    def after_attention(self, residual: Tensor, context: Tensor) -> Tensor:
        """The rest of `forward`, from what attention made, `(T, n·D)`."""
        return self._leave(residual, self.mixer.output(context))

    def _enter_mixer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        residual = self._drop(x)
        return residual, self.norm1(residual)

    def _enter_mlp(self, residual: Tensor, mixed: Tensor) -> tuple[Tensor, Tensor]:
        residual = self._drop(mixed) + residual
        return residual, self.norm2(residual)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.drop_rate, self.training) if self.drop_rate else x

    def _residual(self, x: Tensor) -> Tensor:
        return x.float() if self.residual_in_fp32 else x

    def _recomputed(self, function: Callable[..., Any], *args: Tensor) -> Any:
        """`function(*args)`, computed again in the backward pass of training."""
        if not (self.training and torch.is_grad_enabled()):
            return function(*args)
        # the random state is put back for the second pass, so that dropout draws the same masks
        random = self.drop_rate > 0 or self.mixer.dropout > 0
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)


class PreNormBlock(Block):
    """The block of InternLM2 and Llama: `Block` under their names."""

    NAMES = ("attention", "attention_norm", "ffn_norm", "feed_forward")

    @property
    def mixer(self) -> SelfAttention:
        return self.attention

    @property
    def norm1(self) -> nn.Module:
        return self.attention_norm

    @property
    def norm2(self) -> nn.Module:
        return self.ffn_norm

    @property
    def mlp(self) -> nn.Module:
        return self.feed_forward


class PostNormBlock(PreNormBlock):
    """`apply_post_layer_norm`: h = norm1(x + mixer(x)), out = norm2(h + mlp(h)); dropout on what is added to x and h.

    The residual stream has the model's dtype: norms give it back so.
    """

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def _leave(self, residual: Tensor, mixed: Tensor) -> Tensor:
        run = self._recomputed if self.recompute_norms else _as_is
        hidden = run(self._leave_mixer, residual, mixed)
        return run(self._leave_mlp, hidden, self.mlp(hidden))

    def _leave_mixer(self, x: Tensor, mixed: Tensor) -> Tensor:
        return self.norm1(x + self._drop(mixed))

    def _leave_mlp(self, hidden: Tensor, out: Tensor) -> Tensor:
        return self.norm2(hidden + self._drop(out))


def _as_is(function: Callable[..., Any], *args: Tensor) -> Any:
    return function(*args)


class _Carrying(nn.Module):
    """Makes a layer of one tensor an entry of the list: `cu_seqlens` passes by."""

    def forward(self, carried: Carried) -> Carried:
        hidden, cu_seqlens = carried
        return super().forward(hidden), cu_seqlens  # type: ignore[misc]


class HiddenSplitEmbeddingEntry(_Carrying, HiddenSplitEmbedding):
    """`(tokens (T,), cu_seqlens) -> (hidden (T, H), cu_seqlens)`, parameter `weight`."""


class VocabSplitEmbeddingEntry(_Carrying, VocabSplitEmbedding):
    """`(tokens (T,), cu_seqlens) -> (hidden (T, H), cu_seqlens)`, parameter `word_embeddings.weight`."""


class RmsNormEntry(_Carrying, RmsNorm):
    """The final norm."""


class LayerNormEntry(_Carrying, LayerNorm):
    """The final norm when `norm_type` is not rmsnorm."""


class HeadEntry(ColumnParallelLinear):
    """`(hidden (T, H), cu_seqlens) -> logits (T, V)` in the model's dtype; the loss casts them to fp32.

    With `chunked_loss` (always, or "auto": where they are many) it returns `PendingLogits`, for a loss that knows them.
    """

    chunked_loss: Setting = False

    def forward(self, carried: Carried) -> Tensor | PendingLogits:  # type: ignore[override]
        hidden = carried[0].to(self.weight.dtype)
        if not self._leaves_product(hidden):
            return super().forward(hidden)
        hidden = enter_region(hidden, self.tensor, sequence_parallel=self.sequence_parallel)
        return PendingLogits(hidden, self._weight(), self.tensor, self.out_features)

    def _leaves_product(self, hidden: Tensor) -> bool:
        tokens = len(hidden) * (self.tensor.size if self.sequence_parallel else 1)
        return is_chunked(self.chunked_loss, tokens=tokens, width=self.out_features // self.tensor.size)


class NormHeadEntry(HeadEntry):
    """The head of `norm_head`: every row of its matrix is divided by its length (Baichuan 2, arXiv 2309.10305)."""

    def _weight(self) -> Tensor:
        return normalize(super()._weight(), dim=1)
