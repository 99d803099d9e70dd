"""Loads and stores of the kernel at plain addresses: eight bytes at once, aligned or not, no check of bounds.

Arrays as arguments would be counted, with an atomic operation, at every inner call, and numba has no unaligned loads;
both cost where a few nanoseconds are spent on a character. The kernel answers for its bounds, its caller for the life
of the arrays behind the addresses. Imports numba: only the compiled modules import this.
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


@intrinsic
def numbers_at(typing: Any, base: Any, offset: Any, kind: Any) -> Any:
    """The int64 numbers from an offset on, as a named tuple of this class."""
    result = types.NamedUniTuple(types.int64, len(kind.instance_class._fields), kind.instance_class)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places = (builder.add(args[1], ir.Constant(_WORD, 8 * i)) for i in range(result.count))
        words = [builder.load(_pointer(builder, args[0], place, _WORD), align=8) for place in places]
        return context.make_tuple(builder, result, words)

    return result(types.int64, types.int64, kind), generate


# ---- between threads: what is stored before `publish` is seen by whoever sees what was published -------------------


@intrinsic
def published_at(typing: Any, base: Any, offset: Any) -> Any:
    """An aligned int64 that another thread may publish."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], args[1], _WORD), "acquire", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def publish(typing: Any, base: Any, offset: Any, value: Any) -> Any:
    """Store an aligned int64 for other threads to see."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _pointer(builder, args[0], args[1], _WORD), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def claim(typing: Any, base: Any, offset: Any, value: Any) -> Any:
    """Put `value` where 0 stands, in one step; whether it was 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _pointer(builder, args[0], args[1], _WORD)
        result = builder.cmpxchg(address, ir.Constant(_WORD, 0), args[2], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def add_at(typing: Any, base: Any, offset: Any, value: Any) -> Any:
    """Add to an aligned int64 in one step; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], args[1], _WORD), args[2], "monotonic")

    return types.int64(types.int64, types.int64, types.int64), generate
