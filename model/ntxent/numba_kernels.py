"""NT-Xent's two passes over a tile of similarities on the CPU, compiled by Numba; nothing larger leaves the cache.

`scan_tile` sums exponentials along rows and columns, `gradient_tile` turns them into weights and multiplies. Both take
a tile in strips: the similarities of a strip of columns are a matrix product (`native.block_product`), and what is
done with them follows while they are in the L2 cache.

Where all exponents of a call fit into float32 relative to one bound (`shared`), a pair takes one exponential for its
row and its column. Elsewhere each column, and each lane of a row, keeps a maximum of its own.

Shapes: M rows of one rank against M columns, of the same rank or another; D width, whole panels; a tile is rows
[r0, r1) × columns [c0, c1). `packed` are the columns as `native.block_product` reads them: panels as wide as a block,
[M / width, D, width], zero beyond M.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from native.block_product import NUM_BYTES, block_shape, product
from native.compiled import source_hash
from native.simd import NUM_LANES, add, exp, load, maximum, multiply, multiply_add, splat, store, subtract

SOURCES = ("model.ntxent.numba_kernels", "native.block_product", "native.simd")
"""The modules whose code is compiled into the kernels."""

STRIP = 128
"""Columns of a strip."""
LOWEST = np.float32(-3e38)
"""The maximum of no similarity: below all finite ones."""

ZERO, NO_PAIR = np.float32(0.0), np.float32(-np.inf)
VECTOR_BYTES, STRIP_BYTES = NUM_LANES * NUM_BYTES, STRIP * NUM_BYTES


@cache
def kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """`scan_tile` and `gradient_tile`, compiled for this processor; other threads may run meanwhile.

    What both take:

        u: float32 [M, D], the rows.
        packed: the columns.
        own: whether the columns are the rows. Then a tile serves, transposed, its columns too, and tiles lie on the
            diagonal (r0 = c0), where only what is above the diagonal is computed, or above it.
        shared: as the module says.
        bound: where `shared`, what exponents are relative to.
        tile: r0, r1, c0, c1; c0 a multiple of STRIP.
        s: scratch, float32 [≥ r1 − r0, STRIP].
    """
    version = source_hash(*SOURCES)
    block_rows, block_vectors = block_shape()

    @njit(nogil=True, cache=True)
    def scan_tile(u, packed, own, shared, bound, row_sums, row_maxima, column_sums, column_maxima, tile, s):
        """Add the negatives of a tile to sums of e^(s − maximum), or e^(s − bound), and to maxima of s.

        What rows meet goes to float32 [M, NUM_LANES], a lane for every sixteenth column; what columns meet, as rows
        of their own, to float32 [≥ M, whole vectors].
        """
        _ = version  # in the closure, and so in the key of Numba's cache
        r0, r1, c0, c1 = tile
        for column in range(c0, c1, STRIP):
            num_columns = min(STRIP, c1 - column)
            for part in range(2):
                row, end, mirror = _part(part, own, r0, r1, c0, column, num_columns)
                _similarities(block_rows, block_vectors, u, row, end, packed, column, num_columns, own, s)
                for j in range(0, num_columns, NUM_LANES):
                    sums, maxima = row_sums[row:end], row_maxima[row:end]
                    if shared:
                        total, most = _sum_shared(s[:, j:], splat(bound), sums, maxima)
                    else:
                        total, most = _sum_online(s[:, j:], sums, maxima)
                    if mirror:
                        _merge(total, most, shared, column_sums[column + j :], column_maxima[column + j :])

    @njit(nogil=True, cache=True)
    def gradient_tile(u, packed, own, shared, bound, columns, row_terms, column_terms, gradient, tile, s):
        """Add Σ_j w_ij u_j to the gradients of rows i, and where `own` Σ_i w_ij u_i to those of columns j.

        w_ij = e^(s_ij − L_i) + e^(s_ij − L_j) for negatives, 0 for others. `columns` and `gradient` are float32
        [M, D]. The terms, of rows [M] and of columns [≥ M, whole vectors], are L, or e^(bound − L) where `shared`.
        """
        _ = version
        r0, r1, c0, c1 = tile
        for column in range(c0, c1, STRIP):
            num_columns = min(STRIP, c1 - column)
            for part in range(2):
                row, end, mirror = _part(part, own, r0, r1, c0, column, num_columns)
                _similarities(block_rows, block_vectors, u, row, end, packed, column, num_columns, own, s)
                for j in range(0, num_columns, NUM_LANES):
                    _weigh(s[:, j:], row_terms[row:end], column_terms[column + j :], shared, bound)
                strip = s.ctypes.data
                _add_product(
                    block_rows, block_vectors, strip, STRIP_BYTES, NUM_BYTES, columns[column : column + num_columns],
                    gradient[row:end],
                )  # fmt: skip
                if mirror:
                    _add_product(
                        block_rows, block_vectors, strip, NUM_BYTES, STRIP_BYTES, u[row:end],
                        gradient[column : column + num_columns],
                    )  # fmt: skip

    return scan_tile, gradient_tile


def panel_width() -> int:
    """Columns of a panel of `packed`; D is a multiple of it."""
    return block_shape()[1] * NUM_LANES


@njit(nogil=True)
def _part(part, own, r0, r1, c0, column, num_columns):
    """Rows of a part of a strip, and whether the part serves its columns too.

    On the diagonal, the first part is what lies above the strip's square, and the second the square, which holds each
    pair twice. Elsewhere the second is empty.
    """
    if not (own and r0 == c0):
        return (r0, r1, own) if part == 0 else (r1, r1, False)
    return (r0, column, True) if part == 0 else (column, column + num_columns, False)


@njit(nogil=True)
def _similarities(block_rows, block_vectors, u, row, end, packed, column, num_columns, own, s):
    """Compute s of a part of a strip; −∞ where there is no pair of negatives, and beyond its end in the last vector."""
    num_rows, row_bytes = u.shape[0], u.shape[1] * NUM_BYTES
    width = block_vectors * NUM_LANES
    for j in range(0, num_columns, width):
        product(
            block_rows, block_vectors, u.ctypes.data + row * row_bytes, row_bytes, NUM_BYTES,
            packed.ctypes.data + (column + j) * row_bytes, width * NUM_BYTES, u.shape[1],
            s.ctypes.data + j * NUM_BYTES, STRIP_BYTES, end - row, False,
        )  # fmt: skip
    for i in range(end - row):
        for j in range(num_columns, -(-num_columns // NUM_LANES) * NUM_LANES):
            s[i, j] = NO_PAIR
        if own:
            for excluded in (row + i, (row + i + num_rows // 2) % num_rows):  # itself and its positive
                if column <= excluded < column + num_columns:
                    s[i, excluded - column] = NO_PAIR


@njit(nogil=True)
def _sum_shared(s, bound, row_sums, row_maxima):
    """Add a vector of columns to what rows meet; returns sums and maxima over the rows."""
    total, most = splat(ZERO), splat(LOWEST)
    for i in range(row_sums.shape[0]):
        x = load(s.ctypes.data + i * STRIP_BYTES)
        e = exp(subtract(x, bound))
        total, most = add(total, e), maximum(x, most)
        sums, maxima = row_sums.ctypes.data + i * VECTOR_BYTES, row_maxima.ctypes.data + i * VECTOR_BYTES
        store(sums, add(load(sums), e))
        store(maxima, maximum(x, load(maxima)))
    return total, most


@njit(nogil=True)
def _sum_online(s, row_sums, row_maxima):
    """As `_sum_shared`, relative to the maxima so far."""
    one = splat(np.float32(1.0))
    total, most = splat(ZERO), splat(LOWEST)
    for i in range(row_sums.shape[0]):
        x = load(s.ctypes.data + i * STRIP_BYTES)
        total, most = _joined(total, most, one, x)
        sums, maxima = row_sums.ctypes.data + i * VECTOR_BYTES, row_maxima.ctypes.data + i * VECTOR_BYTES
        row_total, row_most = _joined(load(sums), load(maxima), one, x)
        store(sums, row_total)
        store(maxima, row_most)
    return total, most


@njit(nogil=True)
def _joined(total, most, other_total, other_most):
    """Two sums, each relative to its maximum, as one."""
    highest = maximum(other_most, most)
    other = multiply(other_total, exp(subtract(other_most, highest)))
    return multiply_add(total, exp(subtract(most, highest)), other), highest


@njit(nogil=True)
def _merge(total, most, shared, column_sums, column_maxima):
    """Add sums and maxima over rows to what a vector of columns met before."""
    sums, maxima = column_sums.ctypes.data, column_maxima.ctypes.data
    if shared:
        store(sums, add(load(sums), total))
        store(maxima, maximum(most, load(maxima)))
    else:
        joined, highest = _joined(load(sums), load(maxima), total, most)
        store(sums, joined)
        store(maxima, highest)


@njit(nogil=True)
def _weigh(s, row_terms, column_terms, shared, bound):
    """From similarities with a vector of columns to the weights of `gradient_tile`, in place."""
    columns, relative = load(column_terms.ctypes.data), splat(bound)
    for i in range(row_terms.size):
        address, rows = s.ctypes.data + i * STRIP_BYTES, splat(row_terms[i])
        x = load(address)
        if shared:
            store(address, multiply(exp(subtract(x, relative)), add(rows, columns)))
        else:
            store(address, add(exp(subtract(x, rows)), exp(subtract(x, columns))))


@njit(nogil=True)
def _add_product(block_rows, block_vectors, left, left_row, left_step, right, out):
    """Add left [R, K] · right [K, D] to `out` [R, D]; `left` is an address, with its steps in bytes."""
    row_bytes = out.shape[1] * NUM_BYTES
    for d in range(0, row_bytes, block_vectors * VECTOR_BYTES):
        product(
            block_rows, block_vectors, left, left_row, left_step, right.ctypes.data + d, row_bytes, right.shape[0],
            out.ctypes.data + d, row_bytes, out.shape[0], True,
        )  # fmt: skip
