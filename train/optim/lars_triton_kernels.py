"""LARS on a GPU: the kernels, in Triton. The formulas are in `train.optim.lars_reference`.

A program works on one chunk of one stretch, whose row in a table says where its memory is and what its options are.
Sums are taken in a fixed order, so that the same input gives the same bits. Where all three addresses are multiples of
16 bytes, whole blocks are read and written 16 bytes a thread; the rest of a chunk, which is less than a block, and
stretches that start anywhere else, go element by element.

Legend: S stretches, C chunks.
"""

import numpy as np
import triton
import triton.language as tl

from train.optim.lars_reference import EPS

ROW = np.dtype(
    [
        ("param", "i8"),  # addresses
        ("grad", "i8"),
        ("buffer", "i8"),
        ("numel", "i8"),
        ("lr_address", "i8"),  # of a float32 scalar that takes the place of `lr`; 0: there is none
        ("first_chunk", "i4"),  # of the stretch
        ("first_norm", "i4"),  # the rows of squared norms that belong to the stretch's tensor
        ("num_norms", "i4"),
        ("form", "i4"),  # an index of FORMS
        ("adapt", "i4"),
        ("nesterov", "i4"),
        ("lr", "f4"),
        ("momentum", "f4"),
        ("weight_decay", "f4"),
        ("trust_coefficient", "f4"),
    ]
)
"""A stretch, as the kernels read it."""
FORMS = ("classic", "non_classic", "larc")


def _offset(name: str) -> tl.constexpr:
    """A field's first byte in its row."""
    assert ROW.fields is not None
    return tl.constexpr(ROW.fields[name][1])


_CLASSIC, _NON_CLASSIC, _LARC = (tl.constexpr(i) for i in range(3))
_EPS = tl.constexpr(EPS)
_ROW_BYTES = tl.constexpr(ROW.itemsize)
_PARAM, _GRAD, _BUFFER, _NUMEL = map(_offset, ("param", "grad", "buffer", "numel"))
_LR_ADDRESS = _offset("lr_address")
_FIRST_CHUNK, _FIRST_NORM, _NUM_NORMS = map(_offset, ("first_chunk", "first_norm", "num_norms"))
_FORM, _ADAPT, _NESTEROV = map(_offset, ("form", "adapt", "nesterov"))
_LR, _MOMENTUM, _WEIGHT_DECAY = map(_offset, ("lr", "momentum", "weight_decay"))
_TRUST_COEFFICIENT = _offset("trust_coefficient")


@triton.jit
def partial_norms_kernel(
    rows,
    chunks,
    partials,
    PARAMS: tl.constexpr,
    GRADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    MOVING: tl.constexpr,
):
    """Σ p² and Σ d² over one chunk; zeros where its stretch is not adapted.

    Args:
        rows: ROW [S], as bytes.
        chunks: int32 [., 2], of each program its stretch, and its chunk's number among all.
        partials: float32 [C, 2]; written.
        PARAMS: the parameters' type, and their momentum's.
        GRADS: the gradients'.
        CHUNK: elements of a program.
        BLOCK: of them, those at a time.
        MOVING: whether any stretch is of `non_classic`, where the momentum is a part of d.
    """
    program = tl.program_id(0)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * _ROW_BYTES
    chunk = tl.load(chunks + 2 * program + 1)
    param, grad, buffer, whole, length = _chunk(row, chunk, PARAMS, GRADS, CHUNK, BLOCK)
    adapt = _field(row, _ADAPT, tl.int32) != 0
    whole, length = tl.where(adapt, whole, 0), tl.where(adapt, length, 0)
    form = _field(row, _FORM, tl.int32)
    momentum = _field(row, _MOMENTUM, tl.float32)
    decay = tl.where(form == _LARC, 0.0, _field(row, _WEIGHT_DECAY, tl.float32))  # there d is the gradient alone
    moving = form == _NON_CLASSIC
    nesterov = moving & (_field(row, _NESTEROV, tl.int32) != 0)

    p_square, d_square = _sum_squares(
        param, grad, buffer, 0, whole, length, momentum, decay, moving, nesterov, BLOCK, True, MOVING
    )
    if whole < length:
        p_rest, d_rest = _sum_squares(
            param, grad, buffer, whole, length, length, momentum, decay, moving, nesterov, BLOCK // 2, False, MOVING
        )
        p_square += p_rest
        d_square += d_rest
    tl.store(partials + 2 * chunk, p_square)
    tl.store(partials + 2 * chunk + 1, d_square)


@triton.jit
def sum_norms_kernel(partials, ends, norms, BLOCK: tl.constexpr):
    """The squared norms of one tensor.

    Args:
        partials: float32 [C, 2].
        ends: int32 [num_tensors + 1]; a tensor's chunks are those from its own number's entry to the next one's.
        norms: float32 [num_tensors, 2]; written.
        BLOCK: chunks at a time.
    """
    tensor = tl.program_id(0)
    begin, end = tl.load(ends + tensor), tl.load(ends + tensor + 1)
    p_square, d_square = _sum(partials, begin, end, BLOCK)
    tl.store(norms + 2 * tensor, p_square)
    tl.store(norms + 2 * tensor + 1, d_square)


@triton.jit
def update_kernel(
    rows,
    chunks,
    norms,
    skip,
    PARAMS: tl.constexpr,
    GRADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
):
    """The next parameter and momentum of one chunk, in place.

    Args:
        rows: ROW [S], as bytes.
        chunks: int32 [., 2], of each program its stretch, and its chunk's number among all.
        norms: float32 [., 2], squared; a stretch's row says which of them to add up.
        skip: uint8 scalar, where it is not 0 nothing happens; or None.
        PARAMS: the parameters' type, and their momentum's.
        GRADS: the gradients'.
        CHUNK: elements of a program.
        BLOCK: of them, those at a time.
        NORMS: squared norms at a time.
    """
    if skip is not None:
        if tl.load(skip) != 0:
            return
    # From the last chunk to the first: what the sums were taken of last may still lie in the GPU's cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * _ROW_BYTES
    chunk = tl.load(chunks + 2 * program + 1)
    param, grad, buffer, whole, length = _chunk(row, chunk, PARAMS, GRADS, CHUNK, BLOCK)
    scale, decay, rate = _factors(row, norms, NORMS)
    momentum = _field(row, _MOMENTUM, tl.float32)
    nesterov = _field(row, _NESTEROV, tl.int32) != 0
    for start in range(0, whole, BLOCK):
        _update(param, grad, buffer, start, length, scale, decay, rate, momentum, nesterov, BLOCK, True)
    for start in range(whole, length, BLOCK // 2):
        _update(param, grad, buffer, start, length, scale, decay, rate, momentum, nesterov, BLOCK // 2, False)


@triton.jit
def _field(row, OFFSET: tl.constexpr, KIND: tl.constexpr):
    return tl.load((row + OFFSET).to(tl.pointer_type(KIND)))


@triton.jit
def _chunk(row, chunk, PARAMS: tl.constexpr, GRADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Where a chunk begins in the three tensors, and the elements in whole aligned blocks, and in all."""
    start = (chunk - _field(row, _FIRST_CHUNK, tl.int32)).to(tl.int64) * CHUNK
    length = tl.minimum(_field(row, _NUMEL, tl.int64) - start, CHUNK).to(tl.int32)
    param, grad, buffer = _field(row, _PARAM, tl.int64), _field(row, _GRAD, tl.int64), _field(row, _BUFFER, tl.int64)
    whole = tl.where((param | grad | buffer) % 16 == 0, length // BLOCK * BLOCK, 0)
    return (
        param.to(tl.pointer_type(PARAMS)) + start,
        grad.to(tl.pointer_type(GRADS)) + start,
        buffer.to(tl.pointer_type(PARAMS)) + start,
        whole,
        length,
    )


@triton.jit
def _read(tensor, start, length, wanted, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """A block of one tensor; 0 outside the chunk, and everywhere if it is not `wanted` (None: it is)."""
    i = start + tl.arange(0, BLOCK)
    if WHOLE:
        source = tl.multiple_of(tensor + i, 16)
        if wanted is None:
            block = tl.load(source)
        else:
            block = tl.load(source, mask=tl.zeros([BLOCK], tl.int1) | wanted, other=0.0)
    else:
        if wanted is not None:
            length = tl.where(wanted, length, 0)
        block = tl.load(tensor + i, mask=i < length, other=0.0)
    return block.to(tl.float32)


@triton.jit
def _write(tensor, block, start, length, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    i = start + tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(tl.multiple_of(tensor + i, 16), block)
    else:
        tl.store(tensor + i, block, mask=i < length)


@triton.jit
def _sum_squares(
    param,
    grad,
    buffer,
    begin,
    end,
    length,
    momentum,
    decay,
    moving,
    nesterov,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    MOVING: tl.constexpr,
):
    """Σ p² and Σ d² over blocks. v is a part of d, and read, only where it is `moving`."""
    p_squares = tl.zeros([BLOCK], tl.float32)
    d_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        p = _read(param, start, length, None, BLOCK, WHOLE)
        g = _read(grad, start, length, None, BLOCK, WHOLE)
        d = g + decay * p
        if MOVING:
            v = momentum * _read(buffer, start, length, moving, BLOCK, WHOLE) + d
            d = tl.where(nesterov, momentum * v + d, v)
        p_squares += p * p
        d_squares += d * d
    return tl.sum(p_squares), tl.sum(d_squares)


@triton.jit
def _factors(row, norms, BLOCK: tl.constexpr):
    """What makes one formula of all: x = scale · (g + decay · p), v ← m v + x, p ← p − rate · (v or m v + x)."""
    form = _field(row, _FORM, tl.int32)
    adapt = _field(row, _ADAPT, tl.int32) != 0
    lr, decay = _rate(row), _field(row, _WEIGHT_DECAY, tl.float32)
    first = _field(row, _FIRST_NORM, tl.int32)
    # Without adaptation no norm is read.
    p_square, d_square = _sum(norms, first, first + tl.where(adapt, _field(row, _NUM_NORMS, tl.int32), 0), BLOCK)
    p_norm, d_norm = tl.sqrt(p_square), tl.sqrt(d_square)
    larc = form == _LARC
    known = (p_norm > 0.0) & (d_norm > 0.0)
    measured = tl.where(larc, d_norm + decay * p_norm + _EPS, d_norm)
    ratio = _field(row, _TRUST_COEFFICIENT, tl.float32) * p_norm / tl.where(known, measured, 1.0)
    ratio = tl.where(known, ratio, 1.0)
    decay = tl.where(larc & adapt & (known == 0), 0.0, decay)
    scale = tl.where(form == _CLASSIC, lr * ratio, tl.where(larc, ratio, 1.0))
    rate = tl.where(form == _CLASSIC, 1.0, tl.where(larc, lr, lr * ratio))
    return scale, decay, rate


@triton.jit
def _rate(row):
    """The learning rate now: what lies at its address, or the row's."""
    address = _field(row, _LR_ADDRESS, tl.int64)
    there = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, there, _field(row, _LR, tl.float32))


@triton.jit
def _sum(norms, begin, end, BLOCK: tl.constexpr):
    """Both columns' sums over rows."""
    p_squares = tl.zeros([BLOCK], tl.float32)
    d_squares = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        p_squares += tl.load(norms + 2 * i, mask=i < end, other=0.0)
        d_squares += tl.load(norms + 2 * i + 1, mask=i < end, other=0.0)
    return tl.sum(p_squares), tl.sum(d_squares)


@triton.jit
def _update(
    param, grad, buffer, start, length, scale, decay, rate, momentum, nesterov, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """One block, in place."""
    p = _read(param, start, length, None, BLOCK, WHOLE)
    g = _read(grad, start, length, None, BLOCK, WHOLE)
    v = _read(buffer, start, length, None, BLOCK, WHOLE)
    new = scale * (g + decay * p)
    v = momentum * v + new
    p -= rate * tl.where(nesterov, momentum * v + new, v)
    _write(param, p, start, length, BLOCK, WHOLE)
    _write(buffer, v, start, length, BLOCK, WHOLE)
