"""What stands in a sentencepiece model file, and whether text reaches its BPE unchanged.

A `.model` is one protobuf message; the few fields that matter are read here, so that no protobuf package is needed.
Source: `sentencepiece_model.proto` of sentencepiece (ModelProto, TrainerSpec, NormalizerSpec), `bpe_model.cc` for what
is done with them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

SPACE_PIECE = "\u2581"  # what a space is inside a model
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class PieceType(IntEnum):
    """`SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A piece, its score (float32 in the file; greater is merged first) and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class ModelFile:
    """The parts of a model that decide what ids a text gets; a piece's place in `pieces` is its id."""

    pieces: Sequence[Piece]
    is_bpe: bool
    byte_fallback: bool
    has_normalization: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def parse(content: bytes) -> ModelFile:
    """Read a model.

    Raises:
        ValueError: This is no such message.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    return ModelFile(
        pieces=pieces,
        is_bpe=trainer.get(3, 1) == _BPE,
        byte_fallback=bool(trainer.get(35, 0)),
        has_normalization=bool(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def why_not(model: ModelFile, *, max_pieces: int) -> str | None:
    """Why the cut-and-merge engines cannot stand in for sentencepiece with this model; None if they can."""
    for is_so, reason in (
        (not model.is_bpe, "it is no BPE model"),
        (not model.byte_fallback, "it has no byte fallback"),
        (model.has_normalization, "it normalizes text"),
        (model.add_dummy_prefix, "it puts a space before each text"),
        (model.remove_extra_whitespaces, "it removes white space"),
        (not model.escape_whitespaces, "it keeps spaces as they are"),
        (len(model.pieces) > max_pieces, f"it has more than {max_pieces} pieces"),
    ):
        if is_so:
            return reason
    return _odd_piece(model.pieces)


def _odd_piece(pieces: Sequence[Piece]) -> str | None:
    """A piece that the engines have no rule for."""
    num_bytes = 0
    for text, _, kind in pieces:
        num_bytes += kind == PieceType.BYTE
        if kind == PieceType.UNUSED and len(text) > 1:
            return f"it has unused pieces ({text!r})"
        # sentencepiece looks a lone character up among the reserved pieces, too
        if kind in (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE) and len(text) < 2:
            return f"it has a reserved piece of one character ({text!r})"
        if "\0" in text and (len(text) > 1 or kind == PieceType.USER_DEFINED):
            return f"it has a piece with NUL inside ({text!r})"
        if " " in text or (kind == PieceType.USER_DEFINED and SPACE_PIECE in text):
            return f"it has a piece with a space where the engines expect none ({text!r})"
    return None if num_bytes == 256 else f"it has {num_bytes} byte pieces"


def _piece(content: bytes) -> Piece:
    # nearly all are: tag, length, text, tag of the score, score, and a type where it is not the usual one
    length = content[1] if len(content) > 1 else 0
    if content[:1] == b"\n" and length < 0x80 and len(content) == length + 7 and content[length + 2] == 0x1D:
        return Piece(content[2 : length + 2].decode(), struct.unpack_from("<f", content, length + 3)[0], 1)
    text, score, kind = "", 0.0, int(PieceType.NORMAL)
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, int):
            score = struct.unpack("<f", struct.pack("<I", value))[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; fixed-width values as unsigned integers."""
    position, end = 0, len(content)
    while position < end:
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind == _VARINT:
            value, position = _varint(content, position)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, position = _varint(content, position)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if size < 0 or position + size > end:
            raise ValueError(f"no protobuf message: field type {kind} at byte {position}")
        field = content[position : position + size]
        position += size
        yield tag >> 3, field if kind == _BYTES else int.from_bytes(field, "little")


def _varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(content) and shift < 70:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"no protobuf message: a number without end at byte {position}")
