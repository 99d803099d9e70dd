"""The border between reading texts and tokenizing them: a block of texts goes in, finished lines of a bin come out.

Nothing here works; `preprocess.engine` has the encoders, the pipeline around them makes blocks and writes rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextBlock:
    """Some texts, one sample each, as one buffer of UTF-8.

    Attributes:
        text: Valid UTF-8 without lone surrogates; bytes between two texts (line ends, blanks cut off) belong to none.
        begins, ends: int64 `(n,)`; text i is `text[begins[i]:ends[i]]`, rising, not overlapping, cut at characters.
    """

    text: bytes
    begins: IntArray
    ends: IntArray

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextBlock:
        """The block of these strings, for tests and small things."""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(b"".join(encoded), np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(encoded)], ends)

    def __len__(self) -> int:
        return len(self.begins)


@dataclass(frozen=True)
class Rows:
    """The lines `{"tokens": [...]}` of a block's texts, one after another in their order.

    Attributes:
        data: ASCII bytes as they stand in the bin (bytes or anything with the buffer protocol).
        sizes: int64 `(n,)`, bytes of each line with its newline; their sum is `len(data)`.
        lengths: int64 `(n,)`, tokens of each sample, bos and eos counted.
        largest_id: Largest id among all; -1 where there is none.
    """

    data: Any
    sizes: IntArray
    lengths: IntArray
    largest_id: int


class RowEncoder(Protocol):
    """Encodes blocks; `encode` may be called by several threads at once and its result depends on the block alone.

    Attributes:
        engine: What does the work: "compiled", "arrays" or "sentencepiece".
    """

    engine: str

    def encode(self, block: TextBlock) -> Rows: ...
