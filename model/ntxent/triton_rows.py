"""NT-Xent's GPU kernels that work row by row, in Triton; `model.ntxent.triton_launch` starts them.

    rows   z of both views → the rows u as `triton_kernels` multiplies them, and s of the positives
    chain  what `triton_kernels` gives of dL/du, and the positives' part → dL/dz of both views

A stored row is UNIT·z/(‖z‖·√τ) in fp16: rounded once (PARTS = 1), or as the sum of two numbers (PARTS = 2). UNIT is
√(log2 e), so that the product of two rows is s in powers of two, times SCALE, so that fp16 keeps their small numbers.

Legend: N images, R = 2N rows (view 1, then view 2), D width, P width of a part of a stored row; S stretches.
"""

import math

import triton
import triton.language as tl

SCALE = tl.constexpr(16.0)
UNIT = tl.constexpr(16.0 * math.log2(math.e) ** 0.5)
NORM_EPS = tl.constexpr(1e-6)  # of `model.similarity`


@triton.jit
def rows_kernel(
    z1,
    z2,
    temperature,
    rows,
    positive,
    num_images,
    dim,
    row_stride1,
    stride1,
    row_stride2,
    stride2,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """Normalise the rows of some images, and store them.

    Args:
        z1: projections of view 1 [N, D], fp32, bf16 or fp16.
        z2: projections of view 2.
        temperature: τ; a scalar in memory if LEARNED.
        rows: fp16 [R, PARTS, P], zeros beyond D.
        positive: fp32 [R], s of each row's positive.
        num_images: N.
        dim: D.
        row_stride1: from row to row of `z1`.
        stride1: from number to number of a row.
        row_stride2: of `z2`.
        stride2: of `z2`.
        PADDED: P.
        PARTS: 1 or 2.
        BLOCK: images of a program.
        LANES: a power of two ≥ P.
        LEARNED: see `temperature`.
    """
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, LANES)
    scale = tl.rsqrt(_number(temperature, LEARNED)) * UNIT
    row1 = _load_rows(z1, image, at, num_images, dim, row_stride1, stride1)
    row2 = _load_rows(z2, image, at, num_images, dim, row_stride2, stride2)
    second_view = rows + tl.cast(num_images, tl.int64) * (PARTS * PADDED)
    stored1 = _store_rows(rows, row1 * (scale / _norms(row1))[:, None], image, at, num_images, PADDED, PARTS)
    stored2 = _store_rows(second_view, row2 * (scale / _norms(row2))[:, None], image, at, num_images, PADDED, PARTS)
    s = tl.sum(stored1 * stored2, axis=1) / (UNIT * UNIT)
    tl.store(positive + image, s, mask=image < num_images)
    tl.store(positive + num_images + image, s, mask=image < num_images)


@triton.jit
def chain_kernel(
    z1,
    z2,
    temperature,
    sums,
    margin,
    upstream,
    grad,
    temperature_grads,
    num_images,
    dim,
    row_stride1,
    stride1,
    row_stride2,
    stride2,
    num_stretches,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    LEARNED: tl.constexpr,
):
    """dL/dz of some images, and what these add to dL/dτ.

    The rows are normalised anew, so that the positive's part and the projection off the row have fp32's precision.

    Args:
        z1: as `rows_kernel`'s, and so are all that are not named here.
        z2: see `z1`.
        temperature: see `z1`.
        sums: fp32 [S, R, P] of `triton_kernels.gradient_kernel`.
        margin: fp32 [R], x of `model.ntxent.autograd`.
        upstream: dL/d(loss), a scalar in memory.
        grad: dL/dz [R, D].
        temperature_grads: fp32 [N], written if LEARNED.
        num_images: see `z1`.
        dim: see `z1`.
        row_stride1: see `z1`.
        stride1: see `z1`.
        row_stride2: see `z1`.
        stride2: see `z1`.
        num_stretches: S.
        PADDED: see `z1`.
        BLOCK: see `z1`.
        LANES: see `z1`.
        LEARNED: see `z1`.
    """
    image = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.arange(0, LANES)
    there = image < num_images
    inside = there[:, None] & (at < dim)[None, :]
    row1 = _load_rows(z1, image, at, num_images, dim, row_stride1, stride1)
    row2 = _load_rows(z2, image, at, num_images, dim, row_stride2, stride2)
    norm1, norm2 = _norms(row1), _norms(row2)
    unit1, unit2 = row1 * (1.0 / norm1)[:, None], row2 * (1.0 / norm2)[:, None]
    tau = _number(temperature, LEARNED)
    scale = tl.rsqrt(tau)
    pull = tl.sigmoid(tl.load(margin + image, mask=there, other=0.0))
    pull += tl.sigmoid(tl.load(margin + num_images + image, mask=there, other=0.0))
    grad1, grad2 = (-scale * pull)[:, None] * unit2, (-scale * pull)[:, None] * unit1
    second_view = tl.cast(num_images, tl.int64)
    place = sums + tl.cast(image, tl.int64)[:, None] * PADDED + at[None, :]
    for _ in range(num_stretches):
        grad1 += tl.load(place, mask=inside, other=0.0)
        grad2 += tl.load(place + second_view * PADDED, mask=inside, other=0.0)
        place += 2 * second_view * PADDED
    along1, along2 = tl.sum(grad1 * unit1, axis=1), tl.sum(grad2 * unit2, axis=1)
    scale *= tl.load(upstream).to(tl.float32) / (2 * num_images)
    place = grad + tl.cast(image, tl.int64)[:, None] * dim + at[None, :]
    value1 = _through_norms(grad1, unit1, along1, norm1, scale).to(grad.dtype.element_ty)
    tl.store(place, value1, mask=inside)
    value2 = _through_norms(grad2, unit2, along2, norm2, scale).to(grad.dtype.element_ty)
    tl.store(place + second_view * dim, value2, mask=inside)
    if LEARNED:
        tl.store(temperature_grads + image, (along1 + along2) * scale / (-2.0 * tau), mask=there)


@triton.jit
def _number(value, IN_MEMORY: tl.constexpr):
    if IN_MEMORY:
        value = tl.load(value)
    return tl.cast(value, tl.float32)


@triton.jit
def _load_rows(z, image, at, num_images, dim, row_stride, stride):
    place = z + tl.cast(image, tl.int64)[:, None] * row_stride + tl.cast(at, tl.int64)[None, :] * stride
    return tl.load(place, mask=(image < num_images)[:, None] & (at < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _norms(row):
    return tl.maximum(tl.sqrt(tl.sum(row * row, axis=1)), NORM_EPS)


@triton.jit
def _store_rows(rows, row, image, at, num_images, PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Returns what the stored numbers stand for, in fp32."""
    place = rows + tl.cast(image, tl.int64)[:, None] * (PARTS * PADDED) + at[None, :]
    inside = (image < num_images)[:, None] & (at < PADDED)[None, :]
    high = row.to(tl.float16)
    stored = high.to(tl.float32)
    tl.store(place, high, mask=inside)
    if PARTS == 2:
        low = (row - stored).to(tl.float16)
        tl.store(place + PADDED, low, mask=inside)
        stored += low.to(tl.float32)
    return stored


@triton.jit
def _through_norms(grad, unit, along, norm, scale):
    """The part of a gradient along its row is lost in the normalisation, unless the norm stood at its bound."""
    along = tl.where(norm > NORM_EPS, along, 0.0)
    return (grad - along[:, None] * unit) * (scale / norm)[:, None]
