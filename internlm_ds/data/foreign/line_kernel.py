"""Compiled: samples to the lines of a bin, many at once. `binformat.encode_line` is its readable twin and its oracle.

Imported when a conversion is large enough to pay for numba's start.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

HEAD = np.frombuffer(b'{"tokens": [', dtype=np.uint8)
TAIL = np.frombuffer(b"]}\n", dtype=np.uint8)
# of a line without tokens; of a token with sign, 19 digits, comma and blank
LINE_BYTES, TOKEN_BYTES = len(HEAD) + len(TAIL), 22
_MINUS, _COMMA, _BLANK, _ZERO = 45, 44, 32, 48

_SHORT, _TEN, _SHORT_TEN = np.uint64(2**32 - 1), np.uint64(10), np.uint32(10)

_int64s = types.Array(types.int64, 1, "C")
_uint8s = types.Array(types.uint8, 1, "C")


@njit(types.int64(_int64s, _int64s, _uint8s, _int64s), nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def format_rows(tokens: np.ndarray, lengths: np.ndarray, out: np.ndarray, sizes: np.ndarray) -> int:
    """Write the lines of samples that lie behind one another.

    Args:
        tokens: int64 `(sum(lengths),)`, signed as on disk, above -2^63.
        lengths: int64 `(n,)`.
        out: At least `LINE_BYTES * n + TOKEN_BYTES * sum(lengths)` bytes.
        sizes: int64 `(n,)`, gets the bytes of each line, its newline counted.
    Returns:
        Bytes written.
    """
    at = 0
    token = 0
    digits = np.empty(20, np.uint8)
    for row in range(lengths.size):
        start = at
        for byte in HEAD:
            out[at] = byte
            at += 1
        for index in range(lengths[row]):
            if index > 0:
                out[at] = _COMMA
                out[at + 1] = _BLANK
                at += 2
            value = tokens[token]
            token += 1
            if value < 0:
                out[at] = _MINUS
                at += 1
                value = -value
            # unsigned and short where it can be: division is what costs here
            count = 0
            rest = np.uint64(value)
            while rest > _SHORT:
                digits[count] = np.uint8(_ZERO + rest % _TEN)
                rest //= _TEN
                count += 1
            short = np.uint32(rest)
            while count == 0 or short > 0:
                quotient = np.uint32(short // _SHORT_TEN)
                digits[count] = np.uint8(_ZERO + (short - quotient * _SHORT_TEN))
                short = quotient
                count += 1
            while count > 0:
                count -= 1
                out[at] = digits[count]
                at += 1
        for byte in TAIL:
            out[at] = byte
            at += 1
        sizes[row] = at - start
    return at
