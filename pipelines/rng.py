"""Counter-based random numbers: every draw is a pure function of what it is for.

A draw is addressed by `(seed, epoch, sample, view)` and by the number of the draw within that view. The address is
hashed into a 64-bit key, and draw `d` is output `d` of SplitMix64 started at that key (Steele, Lea, Flood: "Fast
splittable pseudorandom number generators", OOPSLA 2014; constants from Vigna's reference code). Nothing is stored
between draws, so any sample of any epoch is reproduced on any rank, in any order, by any loader.

The formula uses 64-bit wrapping integer arithmetic alone, so that it is bit-equal wherever it is written again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GAMMA = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, SplitMix64's increment
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB

UInt64Array = NDArray[np.uint64]


def mix(x: UInt64Array) -> UInt64Array:
    """SplitMix64's finaliser: a bijection of 64-bit words whose every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MULTIPLIER_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MULTIPLIER_2)
    return x ^ (x >> np.uint64(31))


def absorb(key: UInt64Array, word: UInt64Array) -> UInt64Array:
    """Fold one more part of the address into a key."""
    return mix((key ^ word) + np.uint64(GAMMA))


def bits(key: UInt64Array, draw: UInt64Array) -> UInt64Array:
    """Output number `draw` (from 0) of SplitMix64 started at `key`; arguments broadcast."""
    return mix(key + (draw + np.uint64(1)) * np.uint64(GAMMA))


def key_of(*address: int | UInt64Array | NDArray[np.int64]) -> UInt64Array:
    """Hash an address, such as `(seed, epoch, sample, view)`, into keys.

    Args:
        address: integers (negative ones wrap) or integer arrays, which broadcast against one another.

    Returns:
        uint64 keys of the broadcast shape, at least one-dimensional.
    """
    key = np.zeros(1, np.uint64)
    for word in address:
        key = absorb(key, as_words(word))
    return key


def as_words(value: int | UInt64Array | NDArray[np.int64]) -> UInt64Array:
    """Integers as 64-bit words in an array (arrays wrap silently where NumPy scalars would warn)."""
    if isinstance(value, int):
        return np.array([value % 2**64], np.uint64)
    return np.atleast_1d(np.asarray(value)).astype(np.uint64)


def uniform(key: UInt64Array, draw: int | UInt64Array) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-53, as float64."""
    result: NDArray[np.float64] = (bits(key, as_words(draw)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result
