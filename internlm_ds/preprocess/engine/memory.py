"""Loads and stores of the kernel at plain addresses: eight bytes at once, aligned or not, no check of bounds.

Arrays as arguments would be counted, with an atomic operation, at every inner call, and numba has no unaligned loads;
both cost where a few nanoseconds are spent on a character. The kernel answers for its bounds, its caller for the life
of the arrays behind the addresses. Imports numba: only `kernel` and `merging` import this.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)


def _pointer(builder: Any, base: Any, offset: Any, target: Any) -> Any:
    return builder.inttoptr(builder.add(base, offset), target.as_pointer())


@intrinsic
def byte_at(typing: Any, base: Any, offset: Any) -> Any:
    """The byte at an offset, 0 to 255 as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], _BYTE)
        return builder.zext(builder.load(address), _WORD)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def half_at(typing: Any, base: Any, offset: Any) -> Any:
    """The int32 at an offset, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], ir.IntType(32))
        return builder.sext(builder.load(address), _WORD)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def word_at(typing: Any, base: Any, offset: Any) -> Any:
    """Eight bytes from an offset, aligned or not, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], _WORD)
        return builder.load(address, align=1)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def put_word(typing: Any, base: Any, offset: Any, value: Any) -> Any:
    """Store an int64 at an offset, aligned or not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], _WORD)
        builder.store(args[2], address, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def put_byte(typing: Any, base: Any, offset: Any, value: Any) -> Any:
    """Store the low byte of an int64 at an offset."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], _BYTE)
        builder.store(builder.trunc(args[2], _BYTE), address)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
