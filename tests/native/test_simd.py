"""Vectors in Numba against NumPy in float64."""

import numpy as np
import pytest
from numba import njit

from native.simd import NUM_LANES, exp, load, maximum, store


@njit
def exp_of(numbers, out):
    for i in range(0, numbers.size, NUM_LANES):
        store(out[i:].ctypes.data, exp(load(numbers[i:].ctypes.data)))


@njit
def maximum_of(numbers, others, out):
    store(out.ctypes.data, maximum(load(numbers.ctypes.data), load(others.ctypes.data)))


def test_exp_is_exact_to_one_rounding_or_two():
    numbers = np.linspace(-87, 88, 2**20, dtype=np.float32)
    out = np.empty_like(numbers)
    exp_of(numbers, out)
    exact = np.exp(numbers.astype(np.float64))
    assert (np.abs(out - exact) / exact).max() < 1.2e-7


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, 1), (-0.0, 1), (-88, 0), (-1e30, 0), (-np.inf, 0), (88.5, np.inf), (1e30, np.inf), (np.inf, np.inf)],
)
def test_exp_at_its_ends(number, expected):
    out = np.empty(NUM_LANES, np.float32)
    exp_of(np.full(NUM_LANES, number, np.float32), out)
    np.testing.assert_array_equal(out, np.float32(expected))


def test_nan_goes_through_exp_and_not_through_maximum():
    nan, one, out = (
        np.full(NUM_LANES, np.nan, np.float32),
        np.ones(NUM_LANES, np.float32),
        np.empty(NUM_LANES, np.float32),
    )
    exp_of(nan, out)
    assert np.isnan(out).all()
    maximum_of(nan, one, out)
    np.testing.assert_array_equal(out, one)
