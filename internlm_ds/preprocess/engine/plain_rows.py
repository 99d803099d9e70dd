"""Rows by the tokenizer itself: the truth that other engines are held against, the way for every other model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internlm_ds.data.binformat import encode_line
from internlm_ds.preprocess.rows import Rows, TextBlock
from internlm_ds.preprocess.tokenizers import Encoder


class PlainRows:
    """`RowEncoder` over `encoder.encode`.

    Args:
        encoder: Texts to ids.
        before, behind: Ids put before and behind each sample.
        engine: The library that encodes.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        before: Sequence[int] = (),
        behind: Sequence[int] = (),
        engine: str = "sentencepiece",
    ):
        self.engine = engine
        self._encoder = encoder
        self._before, self._behind = list(before), list(behind)

    def encode(self, block: TextBlock) -> Rows:
        """Rows of a block."""
        samples = [[*self._before, *ids, *self._behind] for ids in self._encoder.encode(texts_of(block))]
        lines = [encode_line(sample) for sample in samples]
        return Rows(
            data=b"".join(lines),
            sizes=np.array([len(line) for line in lines], dtype=np.int64),
            lengths=np.array([len(sample) for sample in samples], dtype=np.int64),
            largest_id=max((max(sample) for sample in samples if sample), default=-1),
        )


def texts_of(block: TextBlock) -> list[str]:
    """The block's texts as strings."""
    text = bytes(block.text)
    return [text[b:e].decode() for b, e in zip(block.begins.tolist(), block.ends.tolist())]
