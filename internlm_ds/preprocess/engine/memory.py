"""Loads and stores of the kernel: eight bytes at any address, no check of bounds, no negative indices.

numba's own indexing adds the array's length to a negative index and has no unaligned loads; both cost where a few
nanoseconds are spent on a character. The kernel answers for its bounds. Imports numba: `kernel` alone imports this.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)


def _address(context: Any, builder: Any, kind: Any, array: Any, offset: Any, target: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(builder.bitcast(data, _BYTE.as_pointer()), [offset]), target.as_pointer())


@intrinsic
def byte_at(typing: Any, array: Any, offset: Any) -> Any:
    """The byte at a byte offset, 0 to 255 as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1], _BYTE)
        return builder.zext(builder.load(address), _WORD)

    return types.int64(array, types.int64), generate


@intrinsic
def half_at(typing: Any, array: Any, index: Any) -> Any:
    """Element of an int32 array, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        offset = builder.shl(args[1], ir.Constant(_WORD, 2))
        address = _address(context, builder, signature.args[0], args[0], offset, ir.IntType(32))
        return builder.sext(builder.load(address), _WORD)

    return types.int64(array, types.int64), generate


@intrinsic
def word_at(typing: Any, array: Any, offset: Any) -> Any:
    """Eight bytes from a byte offset, aligned or not, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1], _WORD)
        return builder.load(address, align=1)

    return types.int64(array, types.int64), generate


@intrinsic
def put_word(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Store an int64 at a byte offset, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1], _WORD)
        builder.store(args[2], address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate


@intrinsic
def put_byte(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Store the low byte of an int64 at a byte offset."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], args[1], _BYTE)
        builder.store(builder.trunc(args[2], _BYTE), address)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), generate
