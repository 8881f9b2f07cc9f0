"""Sixteen float32 numbers at a time, for loops that LLVM does not vectorise by itself.

Numba leaves LLVM's SLP vectoriser off, so that code over the four channels of a pixel stays scalar. Here sixteen lanes
(four RGBX pixels) are a type of their own, and each function on it is a few instructions. AVX-512 has registers of that
width; LLVM splits them on other processors. Addresses are plain integers: nothing is checked, nothing need be aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, models, register_model

# Addresses are sums of integers here. LLVM's last pass may take a summand for the pointer, and the rest for its offset:
# for a loop counter of 0 a store to "null plus something", which is then dropped. So it is told to add integers.
binding.set_option("", "-addr-sink-using-gep=false")

NUM_LANES = 16

# LLVM's types
FLOAT, _INT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
FLOATS, _INTS, _BYTES = (ir.VectorType(kind, NUM_LANES) for kind in (FLOAT, _INT, _BYTE))
_FUSED = ("contract",)  # one rounding, where the processor has a fused multiply-add

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # Cody and Waite's: n · the first part is exact
_ROUNDER = 1.5 * 2.0**23  # the sum with it has no fraction, and its last bits are a whole number
_EXP_TERMS = (0.001381454, 0.008368745, 0.04166839, 0.1666652, 0.49999994, 1.0, 1.0)
"""e^r for |r| ≤ ln(2)/2, highest power first: minimax with the last two fixed, relative error 3e-9."""


class Vector(types.Type):  # type: ignore[misc]
    """NUM_LANES float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{NUM_LANES}")


VECTOR = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is one of LLVM's."""

    def __init__(self, manager: Any, vector_type: Vector) -> None:
        super().__init__(manager, vector_type, FLOATS)


@intrinsic
def splat(typing_context, number):
    """`number` in all lanes."""

    def generate(context, builder, signature, values):
        return in_all_lanes(builder, values[0])

    return VECTOR(types.float32), generate


@intrinsic
def load(typing_context, address):
    """Float32 numbers from memory."""

    def generate(context, builder, signature, values):
        return read(builder, values[0], FLOATS, alignment=4)

    return VECTOR(types.intp), generate


@intrinsic
def load_bytes(typing_context, address):
    """Float32 numbers from uint8 in memory."""

    def generate(context, builder, signature, values):
        return builder.uitofp(read(builder, values[0], _BYTES, alignment=1), FLOATS)

    return VECTOR(types.intp), generate


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Compute a · b + c."""

    def generate(context, builder, signature, values):
        return fused(builder, *values)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic
def add(typing_context, a, b):
    """Compute a + b."""

    def generate(context, builder, signature, values):
        return builder.fadd(*values)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def subtract(typing_context, a, b):
    """Compute a − b."""

    def generate(context, builder, signature, values):
        return builder.fsub(*values)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def multiply(typing_context, a, b):
    """Compute a · b."""

    def generate(context, builder, signature, values):
        return builder.fmul(*values)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def maximum(typing_context, a, b):
    """Take the greater number of each lane; b where either is NaN."""

    def generate(context, builder, signature, values):
        return builder.select(builder.fcmp_ordered(">", *values), *values)

    return VECTOR(VECTOR, VECTOR), generate


@intrinsic
def exp(typing_context, x):
    """Compute e^x to 1.2e-7 of itself; 0 below −87.68, inf above 88.37, NaN of NaN."""

    def generate(context, builder, signature, values):
        log2_e, ln2_high, ln2_low, rounder = map(_constant, (_LOG2_E, -_LN2_HIGH, -_LN2_LOW, _ROUNDER))
        x = _clamped(builder, values[0], -88.0, 89.0)
        shifted = fused(builder, x, log2_e, rounder)
        n = builder.fsub(shifted, rounder)
        r = fused(builder, n, ln2_low, fused(builder, n, ln2_high, x))
        power = _constant(_EXP_TERMS[0])
        for term in _EXP_TERMS[1:]:
            power = fused(builder, power, r, _constant(term))
        # 2^n by its exponent bits; a product, not a sum of bits, so that 0, inf and NaN come out as they should.
        bits, bias, place = builder.bitcast(shifted, _INTS), *(ir.Constant(_INTS, [k] * NUM_LANES) for k in (127, 23))
        return builder.fmul(power, builder.bitcast(builder.shl(builder.add(bits, bias), place), FLOATS))

    return VECTOR(VECTOR), generate


@intrinsic
def store(typing_context, address, vector):
    """Float32 numbers into memory."""

    def generate(context, builder, signature, values):
        write(builder, values[0], values[1], alignment=4)
        return context.get_dummy_value()

    return types.void(types.intp, VECTOR), generate


@intrinsic
def store_quarters(typing_context, address, stride, vector):
    """Four lanes at `address`, the next four `stride` bytes further on, and so on."""

    def generate(context, builder, signature, values):
        address, stride, vector = values
        for i in range(4):
            write(builder, address, builder.shuffle_vector(vector, vector, _indices(range(4 * i, 4 * i + 4))), 4)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, VECTOR), generate


@intrinsic
def store_quarters_as_bytes(typing_context, address, stride, vector):
    """As `store_quarters`, with each number clamped to [0, 255] and truncated to uint8."""

    def generate(context, builder, signature, values):
        address, stride, vector = values
        least, most = _constant(0.0), _constant(255.0)
        vector = builder.select(builder.fcmp_ordered(">", vector, least), vector, least)
        vector = builder.select(builder.fcmp_ordered("<", vector, most), vector, most)
        pixels = builder.bitcast(builder.trunc(builder.fptosi(vector, _INTS), _BYTES), ir.VectorType(_INT, 4))
        for i in range(4):
            write(builder, address, builder.extract_element(pixels, ir.Constant(_INT, i)), 1)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, VECTOR), generate


@intrinsic
def add_fourth_bytes(typing_context, address, source):
    """NUM_LANES RGB pixels at `source` to RGBX at `address`."""

    def generate(context, builder, signature, values):
        address, source = values
        pixels = read(builder, source, ir.VectorType(_BYTE, 3 * NUM_LANES), alignment=1)
        spread = [3 * pixel + min(channel, 2) for pixel in range(NUM_LANES) for channel in range(4)]
        write(builder, address, builder.shuffle_vector(pixels, pixels, _indices(spread)), alignment=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def drop_fourth_bytes(typing_context, address, source):
    """NUM_LANES RGBX pixels at `source` to RGB at `address`."""

    def generate(context, builder, signature, values):
        address, source = values
        pixels = read(builder, source, ir.VectorType(_BYTE, 4 * NUM_LANES), alignment=4)
        kept = [4 * pixel + channel for pixel in range(NUM_LANES) for channel in range(3)]
        write(builder, address, builder.shuffle_vector(pixels, pixels, _indices(kept)), alignment=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _constant(number: float) -> ir.Constant:
    return ir.Constant(FLOATS, [number] * NUM_LANES)


def in_all_lanes(builder: Any, number: Any) -> Any:
    """In an intrinsic's code: `number` in all lanes."""
    nothing = ir.Constant(FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, nothing, _indices([0] * NUM_LANES))


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """In an intrinsic's code: a · b + c."""
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)


def _clamped(builder: Any, vector: Any, least: float, most: float) -> Any:
    """NaN stays NaN."""
    for comparison, bound in (("<", _constant(least)), (">", _constant(most))):
        vector = builder.select(builder.fcmp_ordered(comparison, vector, bound), bound, vector)
    return vector


def _indices(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(values)), list(values))


def read(builder: Any, address: Any, kind: ir.Type, alignment: int) -> Any:
    """In an intrinsic's code: a value from memory."""
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def write(builder: Any, address: Any, value: Any, alignment: int) -> None:
    """In an intrinsic's code: a value into memory."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = alignment
