"""The byte format of token files: `X.bin`, `X.bin.meta`, and the sign of a token.

A bin holds one line `{"tokens": [1, 2, 3]}` per sample, ASCII. Its meta is a `numpy.save` of `(n, 2)` integers: byte
offset of the line, number of tokens. This file is the face of the pair: `binformat` has the bytes of a line and a
table, `binreader` reads, `binwriter` and `rowfile` write, `partial` keeps what is not whole yet. Which files belong to
a data set is `data.catalog`'s, what the tokens mean is `preprocess`'s and `data.packing`'s business.

A meta is renamed into place before its bin: a bin without a meta that fits is a broken pair, never a fresh one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import IntArray, MetaDtype, decode_line, encode_line, meta_path, read_meta
from internlm_ds.data.binreader import Reader, rebuild_meta, scan
from internlm_ds.data.binwriter import Writer, check_output

__all__ = [
    "IntArray",
    "MetaDtype",
    "Reader",
    "Writer",
    "check_output",
    "decode_line",
    "encode_line",
    "join_signed_tokens",
    "meta_path",
    "read_meta",
    "rebuild_meta",
    "scan",
    "split_signed_tokens",
]


def split_signed_tokens(raw: npt.ArrayLike) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Tokens and loss mask of a sample as it stands on disk; nothing else looks at a sign.

    A negative id means: input, but no loss where it is the target. Zero carries no sign and never is a target.

    Returns:
        int64 tokens, all >= 0, and a bool mask, True where the token may be a target; both shaped like `raw`.

    >>> tokens, mask = split_signed_tokens([1, -5, 0, 7])
    >>> tokens.tolist(), mask.tolist()
    ([1, 5, 0, 7], [True, False, False, True])
    """
    signed = np.asarray(raw, dtype=np.int64)
    return np.abs(signed), signed > 0


def join_signed_tokens(tokens: IntArray, mask: npt.NDArray[np.bool_]) -> IntArray:
    """The other way round: ids as they stand on disk.

    >>> join_signed_tokens(np.array([1, 5, 0, 7]), np.array([True, False, False, True])).tolist()
    [1, -5, 0, 7]
    """
    return np.where(mask, tokens, -tokens)
