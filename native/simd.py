"""Sixteen float32 numbers at a time, for loops that LLVM does not vectorise by itself.

Numba leaves LLVM's SLP vectoriser off, so that code over the four channels of a pixel stays scalar. Here sixteen lanes
(four RGBX pixels) are a type of their own, and each function on it is a few instructions. AVX-512 has registers of that
width; LLVM splits them on other processors. Addresses are plain integers: nothing is checked, nothing need be aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

NUM_LANES = 16

_FLOAT, _INT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
_FLOATS, _INTS, _BYTES = (ir.VectorType(kind, NUM_LANES) for kind in (_FLOAT, _INT, _BYTE))
_FUSED = ("contract",)  # one rounding, where the processor has a fused multiply-add


class Vector(types.Type):  # type: ignore[misc]
    """NUM_LANES float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{NUM_LANES}")


_VECTOR = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """A vector is one of LLVM's."""

    def __init__(self, manager: Any, vector_type: Vector) -> None:
        super().__init__(manager, vector_type, _FLOATS)


@intrinsic
def splat(typing_context, number):
    """`number` in all lanes."""

    def generate(context, builder, signature, values):
        nothing = ir.Constant(_FLOATS, ir.Undefined)
        first = builder.insert_element(nothing, values[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, nothing, _indices([0] * NUM_LANES))

    return _VECTOR(types.float32), generate


@intrinsic
def load(typing_context, address):
    """Float32 numbers from memory."""

    def generate(context, builder, signature, values):
        return _load(builder, values[0], _FLOATS, alignment=4)

    return _VECTOR(types.intp), generate


@intrinsic
def load_bytes(typing_context, address):
    """Float32 numbers from uint8 in memory."""

    def generate(context, builder, signature, values):
        return builder.uitofp(_load(builder, values[0], _BYTES, alignment=1), _FLOATS)

    return _VECTOR(types.intp), generate


@intrinsic
def multiply_add(typing_context, a, b, c):
    """Compute a · b + c."""

    def generate(context, builder, signature, values):
        a, b, c = values
        return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)

    return _VECTOR(_VECTOR, _VECTOR, _VECTOR), generate


@intrinsic
def store(typing_context, address, vector):
    """Float32 numbers into memory."""

    def generate(context, builder, signature, values):
        _store(builder, values[0], values[1], alignment=4)
        return context.get_dummy_value()

    return types.void(types.intp, _VECTOR), generate


@intrinsic
def store_quarters(typing_context, address, stride, vector):
    """Four lanes at `address`, the next four `stride` bytes further on, and so on."""

    def generate(context, builder, signature, values):
        address, stride, vector = values
        for i in range(4):
            _store(builder, address, builder.shuffle_vector(vector, vector, _indices(range(4 * i, 4 * i + 4))), 4)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, _VECTOR), generate


@intrinsic
def store_quarters_as_bytes(typing_context, address, stride, vector):
    """As `store_quarters`, with each number clamped to [0, 255] and truncated to uint8."""

    def generate(context, builder, signature, values):
        address, stride, vector = values
        least, most = (ir.Constant(_FLOATS, [bound] * NUM_LANES) for bound in (0.0, 255.0))
        vector = builder.select(builder.fcmp_ordered(">", vector, least), vector, least)
        vector = builder.select(builder.fcmp_ordered("<", vector, most), vector, most)
        pixels = builder.bitcast(builder.trunc(builder.fptosi(vector, _INTS), _BYTES), ir.VectorType(_INT, 4))
        for i in range(4):
            _store(builder, address, builder.extract_element(pixels, ir.Constant(_INT, i)), 1)
            address = builder.add(address, stride)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, _VECTOR), generate


@intrinsic
def add_fourth_bytes(typing_context, address, source):
    """NUM_LANES RGB pixels at `source` to RGBX at `address`."""

    def generate(context, builder, signature, values):
        address, source = values
        pixels = _load(builder, source, ir.VectorType(_BYTE, 3 * NUM_LANES), alignment=1)
        spread = [3 * pixel + min(channel, 2) for pixel in range(NUM_LANES) for channel in range(4)]
        _store(builder, address, builder.shuffle_vector(pixels, pixels, _indices(spread)), alignment=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def drop_fourth_bytes(typing_context, address, source):
    """NUM_LANES RGBX pixels at `source` to RGB at `address`."""

    def generate(context, builder, signature, values):
        address, source = values
        pixels = _load(builder, source, ir.VectorType(_BYTE, 4 * NUM_LANES), alignment=4)
        kept = [4 * pixel + channel for pixel in range(NUM_LANES) for channel in range(3)]
        _store(builder, address, builder.shuffle_vector(pixels, pixels, _indices(kept)), alignment=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


def _indices(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(values)), list(values))


def _load(builder: Any, address: Any, kind: ir.Type, alignment: int) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def _store(builder: Any, address: Any, value: Any, alignment: int) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = alignment
