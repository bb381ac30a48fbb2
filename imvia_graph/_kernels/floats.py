"""Floating-point helpers of the loops: half precision as bits, and a vectorisable exponential."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from imvia_graph._kernels import _compile

# Sums may be reordered, as vectorisation does; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}
compiled = _compile.compiled(fastmath=_FASTMATH)
#: For functions that loops call. If not inlined, they would be compiled differently in a process
#: that compiles them and in one that loads the cache, with other products and sums contracted.
inlined = _compile.compiled(fastmath=_FASTMATH, forceinline=True)

_TWO_TO_112 = np.float32(2.0**112)


def _reinterpret(target: Any, source: Any) -> Any:
    @intrinsic
    def reinterpreted(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    return reinterpreted


#: Reinterpret 32 bits as float32, and float32 as its bits.
as_float = _reinterpret(numba.types.float32, numba.types.uint32)
as_bits = _reinterpret(numba.types.uint32, numba.types.float32)


def _prefetch(typing: Any, address: Any) -> Any:
    """Prefetch the cache line at an address, which need not be valid."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.PointerType(ir.IntType(8))
        number = ir.IntType(32)
        wanted = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        # Arguments of llvm.prefetch: read access, all cache levels, data cache.
        options = [ir.Constant(number, value) for value in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(args[0], byte), *options])
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


# The decorator supplies the first argument, which type checkers do not know.
prefetch: Any = intrinsic(_prefetch)


def widened(value: Any) -> Any:
    """Widen a number to float32, or keep float64; bfloat16 comes as uint16, float16 as int16."""


@overload(widened)
def _widened(value: Any) -> Any:
    def unchanged(value: Any) -> Any:
        return value

    def from_bfloat16(value: Any) -> Any:
        return as_float(np.uint32(value) << np.uint32(16))

    def from_float16(value: Any) -> Any:
        bits = np.uint32(np.uint16(value))
        # The 15 bits without the sign, as a float32 that is 2^112 times too small. If float16 is
        # not finite, all its exponent bits are set; float32 has three more, set below.
        rest = (bits & np.uint32(0x7FFF)) << np.uint32(13)
        magnitude = as_float(rest) * _TWO_TO_112
        if rest >= np.uint32(0x0F800000):
            magnitude = as_float(rest | np.uint32(0x7F800000))
        return -magnitude if bits & np.uint32(0x8000) else magnitude

    return {numba.types.uint16: from_bfloat16, numba.types.int16: from_float16}.get(
        value, unchanged
    )


def narrowed(value: Any, like: Any) -> Any:
    """Convert a number to the type of ``like``: unchanged, or rounded to the bits of bfloat16."""


@overload(narrowed)
def _narrowed(value: Any, like: Any) -> Any:
    def unchanged(value: Any, like: Any) -> Any:
        return value

    def to_bfloat16(value: Any, like: Any) -> Any:
        # Round to nearest, ties to even. For NaN, a mantissa bit that is kept is set.
        bits = as_bits(np.float32(value))
        nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        kept = nearest if value == value else bits | np.uint32(0x400000)
        return np.uint16(kept >> np.uint32(16))

    return to_bfloat16 if like == numba.types.uint16 else unchanged


# Without reordering: r below is exact only in this order of operations.
@_compile.compiled(fastmath={"contract"}, forceinline=True)
def exp(x: Any) -> Any:
    """Return e^x of a float32 x <= 0, within 2 units in the last place; e^-87 below -87."""
    x = max(x, np.float32(-87.0))
    # x = k log 2 + r with |r| <= log(2) / 2; log 2 is split in two parts, the first with few bits.
    k = np.int32(x * np.float32(1.4426950408889634) - np.float32(0.5))
    r = x - np.float32(k) * np.float32(0.693359375)
    r = r + np.float32(k) * np.float32(2.12194440e-4)
    # The polynomial of Cephes' expf.
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * (r * r) + r + np.float32(1)
    return p * as_float(np.uint32(k + np.int32(127)) << np.uint32(23))
