"""Texts to finished rows of a bin: the border between reading files and encoding.

Readers hand over blocks of whole lines or lists of texts, an encoder gives back the bytes of the bin and the numbers
of its meta. `SentencePieceRows` says with sentencepiece itself what the right rows are; `engine` is the fast encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from internlm_ds.data.binmeta import IntArray, encode_line
from internlm_ds.preprocess.tokenizers import Encoder


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a bin.

    Attributes:
        data: The rows, one behind the other: `{"tokens": [1, 2]}` and a line end each.
        sizes: int64 `(n,)`, bytes of each row.
        lengths: int64 `(n,)`, tokens of each row.
        empty: Texts that gave no token, or are white space alone, and were left out.
        largest_id: Of all tokens; 0 without any.
    """

    data: bytes | memoryview
    sizes: IntArray
    lengths: IntArray
    empty: int
    largest_id: int


class RowEncoder(Protocol):
    """Callable from several threads at once; what it gives does not depend on which thread asks, nor on what before."""

    def encode_lines(self, block: bytes | memoryview) -> Rows:
        """Rows of the lines of a text.

        Args:
            block: Valid UTF-8, whole lines that end in `\\n`, `\\r\\n` or `\\r`; the last may lack its end. Each is
                stripped as `str.strip` does; blank ones are no texts, nor counted.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        """Rows of texts as they are; those without tokens, or of white space alone, are counted and left out."""
        ...


class SentencePieceRows:
    """The obvious version, around any encoder.

    Args:
        before, behind: Ids put before and behind each sample (bos, eos).
        keep_empty: Make rows of texts without tokens too, as the reference does.
    """

    def __init__(
        self, encoder: Encoder, *, before: Sequence[int] = (), behind: Sequence[int] = (), keep_empty: bool = False
    ):
        self._encoder, self._before, self._behind, self._keep_empty = encoder, before, behind, keep_empty

    def encode_lines(self, block: bytes | memoryview) -> Rows:
        text = str(block, "utf-8").replace("\r\n", "\n").replace("\r", "\n")
        return self.encode_texts([stripped for line in text.split("\n") if (stripped := line.strip())])

    def encode_texts(self, texts: Sequence[str]) -> Rows:
        samples = [
            [*self._before, *ids, *self._behind]
            for text, ids in zip(texts, self._encoder.encode(texts))
            if self._keep_empty or (ids and not text.isspace())
        ]
        lines = [encode_line(sample) for sample in samples]
        return Rows(
            data=b"".join(lines),
            sizes=np.array([len(line) for line in lines], dtype=np.int64),
            lengths=np.array([len(sample) for sample in samples], dtype=np.int64),
            empty=len(texts) - len(samples),
            largest_id=max((max(sample, default=0) for sample in samples), default=0),
        )
