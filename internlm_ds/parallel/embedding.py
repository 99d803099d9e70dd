"""Token embeddings that are split over the tensor axis: along the hidden dimension or along the vocabulary.

The two classes differ in the name of their parameter too, as InternLM's do, so checkpoint files tell them apart.
`grad_scale` (`embed_grad_scale`) shrinks the gradient of the embedding and leaves its value alone.

Legend: T tokens, t this rank's tokens; V vocabulary, H hidden; v, h this rank's share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from internlm_ds.layout.shards import bounds
from internlm_ds.parallel.collectives import gather_last_dim, leave_region, share, split_tokens
from internlm_ds.parallel.context import Axis
from internlm_ds.parallel.linear import scale_gradient


class HiddenSplitEmbedding(nn.Module):
    """`(T,) int64 -> (T, H)`; a rank holds a slice of the hidden dimension, parameter `weight` `(V, h)`.

    With `sequence_parallel` a rank gets its tokens, `(t, H)`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor: Axis,
        sequence_parallel: bool = False,
        grad_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tensor, self.hidden_size = tensor, hidden_size
        self.sequence_parallel, self.grad_scale = sequence_parallel, grad_scale
        width = share(hidden_size, tensor, what="model.hidden_size")
        self.weight = nn.Parameter(torch.empty(vocab_size, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = gather_last_dim(embedding(tokens, self.weight), self.tensor, length=self.hidden_size)
        if self.sequence_parallel:
            hidden = split_tokens(hidden, self.tensor)
        return scale_gradient(hidden, self.grad_scale)


class VocabSplitEmbedding(nn.Module):
    """`(T,) int64 -> (T, H)`; a rank holds a slice of the vocabulary, parameter `word_embeddings.weight` `(v, H)`.

    With `sequence_parallel` a rank gets its tokens, `(t, H)`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tensor: Axis,
        sequence_parallel: bool = False,
        grad_scale: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.tensor, self.sequence_parallel, self.grad_scale = tensor, sequence_parallel, grad_scale
        self.start, self.stop = bounds(vocab_size, size=tensor.size, rank=tensor.rank)
        self.word_embeddings = nn.Module()
        self.word_embeddings.weight = nn.Parameter(torch.empty(self.stop - self.start, hidden_size, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = leave_region(self._own_rows(tokens), self.tensor, sequence_parallel=self.sequence_parallel)
        return scale_gradient(hidden, self.grad_scale)

    def _own_rows(self, tokens: Tensor) -> Tensor:
        """The embeddings of this rank's part of the vocabulary, `(T, H)`; 0 for other tokens."""
        weight = self.word_embeddings.weight
        if self.tensor.size == 1:
            return embedding(tokens, weight)
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        rows = embedding((tokens - self.start).masked_fill(elsewhere, 0), weight)
        return rows.masked_fill(elsewhere[:, None], 0)
