"""When the loss is computed in chunks of rows, and how many rows a chunk has.

Legend: T tokens of a micro-batch, v this rank's part of the vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from typing import Literal

Setting = bool | Literal["auto"]

# logits (T times v) from which "auto" computes in chunks: 128 MiB of them in fp32, of which the plain way makes four
CHUNKED_FROM = 2**25
# a chunk's logits take so much in fp32: what a processor's caches and products like; on a GPU fewer rows would make
# adding up the weight's gradient cost as much as the products
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ON_DEVICE = 1 << 30
FEWEST_ROWS = 64


def is_chunked(setting: Setting, *, tokens: int, width: int) -> bool:
    """Whether the loss of logits `(tokens, width)` is computed in chunks.

    >>> is_chunked("auto", tokens=8192, width=103168), is_chunked("auto", tokens=512, width=1000)
    (True, False)
    """
    return tokens * width >= CHUNKED_FROM if setting == "auto" else setting


def rows_of_chunk(width: int, *, device: str) -> int:
    """R, for logits of that width on that type of device.

    >>> rows_of_chunk(103168, device="cpu"), rows_of_chunk(103168, device="cuda")
    (162, 2601)
    """
    return max(FEWEST_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES_ON_DEVICE) // (4 * max(width, 1)))
