"""Matrix products from blocks in registers, against NumPy in float64."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from native.block_product import NUM_BYTES, block_shape, product
from native.simd import NUM_LANES

BLOCK_ROWS, BLOCK_VECTORS = block_shape()
WIDTH = BLOCK_VECTORS * NUM_LANES


@njit
def multiply(a, b, c, add):
    product(
        BLOCK_ROWS, BLOCK_VECTORS, a.ctypes.data, a.strides[0], a.strides[1], b.ctypes.data, b.strides[0], b.shape[0],
        c.ctypes.data, c.strides[0], c.shape[0], add,
    )  # fmt: skip


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("num_rows", "depth"), [(1, 1), (3, 7), (8, 16), (21, 401)])
def test_product(num_rows, depth, transposed, add):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((depth, num_rows) if transposed else (num_rows, depth)).astype(np.float32)
    a = a.T if transposed else a
    b = rng.standard_normal((depth, WIDTH + 3)).astype(np.float32)[:, :WIDTH]
    before = rng.standard_normal((num_rows + 1, WIDTH + 1)).astype(np.float32)
    c = before.copy()
    multiply(a, b, c[:num_rows, :WIDTH], add)
    expected = before.astype(np.float64)
    expected[:num_rows, :WIDTH] = a.astype(np.float64) @ b + (expected[:num_rows, :WIDTH] if add else 0)
    np.testing.assert_allclose(c, expected, rtol=0, atol=depth * NUM_BYTES * 1e-7)
    outside = np.ones(before.shape, bool)
    outside[:num_rows, :WIDTH] = False
    np.testing.assert_array_equal(c[outside], before[outside])


def test_equal_rows_have_equal_products():
    """Wherever in a block, or beyond the last whole one, a number stands."""
    rng = np.random.default_rng(0)
    row, column = rng.standard_normal((2, 129)).astype(np.float32)
    c = np.empty((2 * BLOCK_ROWS + 1, WIDTH), np.float32)
    multiply(np.tile(row, (len(c), 1)), np.tile(column[:, None], WIDTH), c, False)
    assert (c == c[0, 0]).all()


PROGRAM = """
import numpy as np
from numba import njit
from native.block_product import block_shape, product
from native.simd import NUM_LANES

rows, vectors = block_shape()
width = vectors * NUM_LANES


@njit
def add_product(a, b, c):
    for start in range(0, c.shape[1], width):
        product(
            rows, vectors, a.ctypes.data, a.strides[0], 4, b.ctypes.data + 4 * start, b.strides[0], b.shape[0],
            c.ctypes.data + 4 * start, c.strides[0], c.shape[0], True,
        )


for num_rows in range(1, 2 * rows + 2):
    c = np.full((num_rows, 2 * width), 7, np.float32)
    add_product(np.ones((num_rows, 128), np.float32), np.ones((2, 2 * width), np.float32), c)
    assert (c == 9).all(), (num_rows, c[:, 0])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
@pytest.mark.parametrize("processor", [None, "x86-64-v3", "x86-64"])
def test_no_row_is_dropped_where_it_is_known_that_something_is_added(processor):
    """Compiled for a constant `add`, LLVM once took a row's address for an offset from null, and dropped its store."""
    environment = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""} if processor else {}
    command = [sys.executable, "-c", PROGRAM]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=os.environ | environment, timeout=200)
