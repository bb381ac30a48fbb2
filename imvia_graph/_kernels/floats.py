"""Floating point for the loops: half precision as bits, and an exponential for vector registers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from imvia_graph._kernels import _compile

# Sums may be taken in any order, as vector registers do; NaN and infinity keep their meaning.
_FREELY = {"reassoc", "contract", "nsz"}
compiled = _compile.compiled(fastmath=_FREELY)
#: For what loops call: a function of its own would be another one in the process that compiles it
#: than in those that read what was compiled, and differ in which products and sums are contracted.
inlined = _compile.compiled(fastmath=_FREELY, forceinline=True)

_TWO_TO_112 = np.float32(2.0**112)


def _reinterpret(target: Any, source: Any) -> Any:
    @intrinsic
    def reinterpreted(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), generate

    return reinterpreted


#: The float32 of 32 bits, and the bits of a float32.
as_float = _reinterpret(numba.types.float32, numba.types.uint32)
as_bits = _reinterpret(numba.types.uint32, numba.types.float32)


def _prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which need not be there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.PointerType(ir.IntType(8))
        number = ir.IntType(32)
        wanted = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, wanted, "llvm.prefetch.p0i8")
        # To read, into all levels of the cache, of data.
        options = [ir.Constant(number, value) for value in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(args[0], byte), *options])
        return context.get_dummy_value()

    return numba.types.void(numba.types.intp), generate


# To a type checker the decorator loses that the first argument is the compiler's.
prefetch: Any = intrinsic(_prefetch)


def widened(value: Any) -> Any:
    """A number in float32 or float64; bfloat16 comes as uint16, float16 as int16."""


@overload(widened)
def _widened(value: Any) -> Any:
    def as_it_is(value: Any) -> Any:
        return value

    def of_bfloat16(value: Any) -> Any:
        return as_float(np.uint32(value) << np.uint32(16))

    def of_float16(value: Any) -> Any:
        bits = np.uint32(np.uint16(value))
        # The 15 bits beside the sign, as a float32 that is 2^112 times too small; where float16
        # is not finite all bits of its exponent are set, and float32 has three more.
        rest = (bits & np.uint32(0x7FFF)) << np.uint32(13)
        magnitude = as_float(rest) * _TWO_TO_112
        if rest >= np.uint32(0x0F800000):
            magnitude = as_float(rest | np.uint32(0x7F800000))
        return -magnitude if bits & np.uint32(0x8000) else magnitude

    return {numba.types.uint16: of_bfloat16, numba.types.int16: of_float16}.get(value, as_it_is)


def narrowed(value: Any, like: Any) -> Any:
    """A number in the type of ``like``: float32 as it is, or rounded to bfloat16's bits."""


@overload(narrowed)
def _narrowed(value: Any, like: Any) -> Any:
    def as_it_is(value: Any, like: Any) -> Any:
        return value

    def to_bfloat16(value: Any, like: Any) -> Any:
        # To the nearest, ties to even. NaN of any kind keeps a set bit.
        bits = as_bits(np.float32(value))
        nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        kept = nearest if value == value else bits | np.uint32(0x400000)
        return np.uint16(kept >> np.uint32(16))

    return to_bfloat16 if like == numba.types.uint16 else as_it_is


# Not to be reordered: r below is exact only as it stands.
@_compile.compiled(fastmath={"contract"}, forceinline=True)
def exp(x: Any) -> Any:
    """e^x of a float32 x <= 0, within 2 units in the last place; e^-87 below -87."""
    x = max(x, np.float32(-87.0))
    # x = k log 2 + r with |r| <= log(2) / 2; log 2 in two parts, the first of few bits.
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
