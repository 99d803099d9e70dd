"""Token embeddings that are split over the tensor axis: along the hidden dimension or along the vocabulary.

The two classes differ in the name of their parameter too, as InternLM's do, so checkpoint files tell them apart.
`grad_scale` (`embed_grad_scale`) shrinks the gradient of the embedding and leaves its value alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from internlm_ds.parallel.collectives import (
    gather_from_tensor_ranks,
    require_single,
    share,
    sum_over_tensor_ranks,
)
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import scale_gradient


class HiddenSplitEmbedding(nn.Module):
    """`(T,) int64 -> (T, H)`; a rank holds a slice of the hidden dimension, parameter `weight` `(V, h)`."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor: Axis,
        grad_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        require_single(tensor)
        self.tensor, self.grad_scale = tensor, grad_scale
        width = share(hidden_size, tensor, what="model.hidden_size")
        self.weight = nn.Parameter(torch.empty(vocab_size, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = gather_from_tensor_ranks(embedding(tokens, self.weight), self.tensor)
        return scale_gradient(hidden, self.grad_scale)


class VocabSplitEmbedding(nn.Module):
    """`(T,) int64 -> (T, H)`; a rank holds a slice of the vocabulary, parameter `word_embeddings.weight` `(v, H)`."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor: Axis,
        grad_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        require_single(tensor)
        self.tensor, self.grad_scale = tensor, grad_scale
        rows = share(vocab_size, tensor, what="model.vocab_size")
        self.word_embeddings = nn.Module()
        self.word_embeddings.weight = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = sum_over_tensor_ranks(embedding(tokens, self.word_embeddings.weight), self.tensor)
        return scale_gradient(hidden, self.grad_scale)
