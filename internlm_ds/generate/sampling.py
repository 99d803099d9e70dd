"""Continuing a sequence of token ids, one token at a time, on one process.

Each token passes the model once: blocks keep keys and values (`cache`), so the cost of a token does not include those
before it. Text, tokenizers and checkpoints are `run`'s business.

Legend: t new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from internlm_ds.generate.cache import LayerCache
from internlm_ds.model.block import Block
from internlm_ds.model.layers import LanguageModel


class Decoder:
    """A model in evaluation mode and what it remembers of one sequence.

    Logits equal those of a pass over the whole sequence. With dynamic NTK that has a price: once the sequence is longer
    than `max_position_embeddings`, every new token changes the angles of all earlier ones, and all are read again.
    """

    def __init__(self, model: LanguageModel):
        self.model = model.eval()
        self._blocks = [layer for layer in model.layers if isinstance(layer, Block)]
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._base: float | None = None
        self._caches: dict[Block, LayerCache] = {}

    @torch.no_grad()
    def advance(self, tokens: Tensor) -> Tensor:
        """Read the next tokens, int64 `(t,)`; return logits `(t, V)`, whose last row foretells what follows them."""
        self._tokens = torch.cat((self._tokens.to(tokens.device), tokens))
        return self._read(self._unread(tokens))[-len(tokens) :]

    def _unread(self, new: Tensor) -> Tensor:
        """The tokens to read now: the new ones, or all when the rotary base is another one than so far."""
        base = self._blocks[0].mixer.rotary.base_for(len(self._tokens)) if self._blocks else None
        if self._caches and base == self._base:
            return new
        self._base, self._caches = base, {block: LayerCache() for block in self._blocks}
        return self._tokens

    def _read(self, tokens: Tensor) -> Tensor:
        x = tokens
        for layer in self.model.layers:
            if isinstance(layer, Block):
                x = layer.extend(x, self._caches[layer])
            else:
                out = layer((x, None))
                x = out if isinstance(out, Tensor) else out[0]
        return x


def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = (),
    num_tokens: int | None = None,
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens` or one of `stop_ids` (which is not yielded).

    Args:
        model: All layers, on one device.
        prompt: At least one id.
        max_new_tokens: Upper bound of ids that are yielded.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens whose probabilities reach this sum.
        generator: Source of randomness, on the CPU; torch's own when None.
        stop_ids: Ids that end the sequence.
        num_tokens: Ids of this value and above are never drawn (a vocabulary padded beyond the tokenizer's).
    """
    decoder, device = Decoder(model), next(model.parameters()).device
    tokens = torch.tensor(list(prompt), dtype=torch.int64, device=device)
    for _ in range(max_new_tokens):
        logits = decoder.advance(tokens)[-1, :num_tokens]
        token = pick(logits.double().cpu(), temperature=temperature, top_p=top_p, generator=generator)
        if token in stop_ids:
            return
        yield token
        tokens = torch.tensor([token], device=device)


def pick(
    logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """Draw one id from logits `(V,)`; nucleus sampling as in Holtzman et al., arXiv 1904.09751, section 3.1."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    # a token stays as long as those before it do not reach top_p, so the likeliest one always stays
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    return int(ids[torch.multinomial(kept, 1, generator=generator)])
