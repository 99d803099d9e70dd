"""Lines of a buffer of UTF-8 without the blanks around them, all lines at once: what `str.strip` does, on bytes.

ASCII blanks are found in a few passes over the buffer, longer ones by looking at the ends of all lines again until
none moves. No loop over lines, but for the odd one with dozens of longer blanks at its margin.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internlm_ds.preprocess.rows import IntArray

ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

# what Python takes for a blank, by the number of its bytes in UTF-8
BLANKS = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f ",
    "\x85\xa0",
    "\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000",
)
_ROUNDS = 24
_EDGE = b" " * 64
_WINDOW = np.uint64((1 << 48) - 1)  # as many bits as a float64 holds exactly


def _marks(characters: str, byte: int) -> BoolArray:
    marks = np.zeros(256, dtype=np.bool_)
    marks[[character.encode()[byte] for character in characters]] = True
    return marks


_ONE_BYTE = _marks(BLANKS[0], 0)
_FIRST = _marks(BLANKS[1] + BLANKS[2], 0)
_LAST = _marks(BLANKS[1] + BLANKS[2], -1)
_SECOND_OF_TWO = _marks(BLANKS[1], 1)
# blanks of three bytes by their 16 bits
_THREE_BYTES = np.zeros(1 << 16, dtype=np.bool_)
_THREE_BYTES[[ord(character) for character in BLANKS[2]]] = True


def stripped_lines(text: bytes) -> tuple[IntArray, IntArray]:
    """Begins and ends (int64) of the lines that hold more than blanks, each without the blanks around it.

    Args:
        text: Valid UTF-8. A line ends with `\\n`, `\\r` or both; the last one may lack its end.
    """
    # a look over the edge, of up to 64 bytes, meets blanks
    data = np.frombuffer(b"".join((_EDGE, text, b"\n", _EDGE)), dtype=np.uint8)
    begins, ends = _lines(data[64:-64])
    begins, ends = _without_ascii_blanks(data, begins + 64, ends + 64)
    begins = _strip_left(data, begins, ends)
    kept = begins < ends
    begins, ends = begins[kept], ends[kept]
    return begins - 64, _strip_right(data, begins, ends) - 64


def _lines(data: ByteArray) -> tuple[IntArray, IntArray]:
    newline = data == 0x0A
    if (returns := data == 0x0D).any():
        newline |= returns  # the empty line between \r and \n is dropped like every other
    ends = np.flatnonzero(newline)
    begins = np.empty_like(ends)
    begins[:1], begins[1:] = 0, ends[:-1] + 1
    return begins, ends


def _without_ascii_blanks(data: ByteArray, begins: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Lines from the first to the last byte that is no ASCII blank; those without any are left out.

    One bit a byte says "no blank", 48 of them are looked at together.
    """
    filled = (data - np.uint8(9) >= 5) & (data - np.uint8(28) >= 5)  # 9 to 13 and 28 to 32 are blanks
    bits = np.packbits(filled, bitorder="little")
    words = np.lib.stride_tricks.as_strided(bits[:8].view("<u8"), shape=(len(bits) - 7,), strides=(1,))
    rows = np.flatnonzero(~filled[begins] & (begins < ends))
    while len(rows):
        at = begins[rows]
        seen = (words[at >> 3] >> (at & 7).astype(np.uint64)) & _WINDOW
        _, first = np.frexp((seen & (~seen + np.uint64(1))).astype(np.float64))
        begins[rows] = at + np.where(seen, first - 1, 48)
        rows = rows[(seen == 0) & (begins[rows] < ends[rows])]
    kept = begins < ends
    begins, ends = begins[kept], ends[kept]
    rows = np.flatnonzero(~filled[ends - 1])
    while len(rows):
        at = ends[rows] - 48
        seen = (words[at >> 3] >> (at & 7).astype(np.uint64)) & _WINDOW
        _, last = np.frexp(seen.astype(np.float64))
        ends[rows] = at + last  # nothing seen: 0, on to the 48 before
        rows = rows[seen == 0]
    return begins, ends


def _strip_left(data: ByteArray, begins: IntArray, ends: IntArray) -> IntArray:
    rows = np.flatnonzero(_FIRST[data[begins]])
    for _ in range(_ROUNDS):
        width = _width_behind(data, begins[rows])
        rows, width = rows[width > 0], width[width > 0]
        begins[rows] += width
        rows = rows[begins[rows] < ends[rows]]
        if not len(rows):
            return begins
    for row in rows.tolist():
        line = data[begins[row] : ends[row]].tobytes().decode()
        begins[row] = ends[row] - len(line.lstrip().encode())
    return begins


def _strip_right(data: ByteArray, begins: IntArray, ends: IntArray) -> IntArray:
    """The lines are not blank, so each stops at a character of its own."""
    rows = np.flatnonzero(_LAST[data[ends - 1]])
    for _ in range(_ROUNDS):
        width = _width_before(data, ends[rows])
        rows, width = rows[width > 0], width[width > 0]
        if not len(rows):
            return ends
        ends[rows] -= width
    for row in rows.tolist():
        line = data[begins[row] : ends[row]].tobytes().decode()
        ends[row] = begins[row] + len(line.rstrip().encode())
    return ends


def _width_behind(data: ByteArray, at: IntArray) -> IntArray:
    """Bytes of the blank that begins at each place, 0 where there is none."""
    width = _width(data[at], data[at + 1], data[at + 2])
    width += _ONE_BYTE[data[at]]
    return width


def _width_before(data: ByteArray, at: IntArray) -> IntArray:
    """Bytes of the blank that ends before each place, 0 where there is none."""
    last, before = data[at - 1], data[at - 2]
    width = _width(data[at - 3], before, last)
    width[width != 3] = 0  # of two bytes would be those in the middle
    width[(before == 0xC2) & _SECOND_OF_TWO[last]] = 2
    width += _ONE_BYTE[last]
    return width


def _width(first: ByteArray, second: ByteArray, third: ByteArray) -> IntArray:
    """3 or 2 where the bytes begin with a blank of so many, else 0."""
    point = (first.astype(np.uint16) & 0x0F) << 12 | (second.astype(np.uint16) & 0x3F) << 6 | (third & 0x3F)
    three = ((first & 0xF0) == 0xE0) & _THREE_BYTES[point]
    width: IntArray = np.where(three, 3, 0)
    width[(first == 0xC2) & _SECOND_OF_TWO[second]] = 2
    return width
