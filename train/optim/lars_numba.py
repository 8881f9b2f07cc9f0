"""A LARS step over float32 memory on the CPU, compiled: one call for many stretches, on the calling thread.

Stretch by stretch, the norms are summed and then, while the parameter and its gradient lie in a cache, the parameter
and its momentum are moved: of the seven streams of memory that this takes, five come from farther away, as many as in
plain SGD. The formulas are those of `train.optim.lars_reference`.

Sums are in float64, over blocks of a fixed size: what is computed of a stretch is the same whoever computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from native.compiled import source_hash
from train.optim.lars_reference import EPS, LARGEST

STEP, NORMS, UPDATE = range(3)
"""A whole step; only the sums of squares; only what follows from them."""
CLASSIC, NON_CLASSIC, LARC = range(3)
"""Places in `train.optim.stretches.FORMS`."""

ROW = np.dtype(
    [
        ("param", np.intp),
        ("grad", np.intp),
        ("buffer", np.intp),
        ("size", np.intp),
        ("options", np.intp),
    ]
)
"""A stretch: addresses, the number of elements, and the row of its options."""

OPTIONS = np.dtype(
    [
        ("lr", np.float64),
        ("momentum", np.float64),
        ("weight_decay", np.float64),
        ("trust_coefficient", np.float64),
        ("adapt", np.bool_),
        ("form", np.int64),
        ("nesterov", np.bool_),
    ]
)

BLOCK = 16384  # elements: larger and smaller ones were as fast (EPYC, one thread, November 2026)
ZERO, ONE = np.float32(0), np.float32(1)


@cache
def kernel() -> Callable[..., None]:
    """The compiled `run(job, rows, options, norms)`.

    Arguments: one of `STEP`, `NORMS`, `UPDATE`; `ROW` [S]; `OPTIONS` [O]; squared norms, float64 [S, 2], which are
    written by `NORMS` and read by `UPDATE`. Addresses are trusted: the memory must be there.
    """
    version = source_hash("train.optim.lars_numba", "train.optim.lars_reference")

    @njit(nogil=True, cache=True)
    def run(job, rows, options, norms):
        _ = version  # in the closure, and so in the key of Numba's cache
        for i in range(rows.size):
            size = rows[i].size
            p = carray(_pointer(rows[i].param), size, np.float32)
            g = carray(_pointer(rows[i].grad), size, np.float32)
            v = carray(_pointer(rows[i].buffer), size, np.float32)
            chosen = options[rows[i].options]
            if job != UPDATE:
                norms[i, 0], norms[i, 1] = _squared_norms(p, g, v, chosen)
            if job != NORMS:
                _update(p, g, v, chosen, np.sqrt(norms[i, 0]), np.sqrt(norms[i, 1]))

    return run  # type: ignore[no-any-return]


@njit(nogil=True)
def _squared_norms(p, g, v, options):
    """‖p‖² and the square of what the form measures; zeros without adaptation."""
    param_sum, measured_sum = 0.0, 0.0
    if options.adapt:
        decay = ZERO if options.form == LARC else np.float32(options.weight_decay)
        momentum = np.float32(options.momentum)
        # The whole update is (m² v + (1 + m) d) with Nesterov's momentum, and m v + d without.
        kept, fresh = momentum, ONE
        if options.nesterov:
            kept, fresh = momentum * momentum, ONE + momentum
        for first in range(0, p.size, BLOCK):
            last = min(first + BLOCK, p.size)
            if options.form == NON_CLASSIC:
                sums = _sums_of_update(p[first:last], g[first:last], v[first:last], decay, kept, fresh)
            else:
                sums = _sums_of_gradient(p[first:last], g[first:last], decay)
            param_sum += sums[0]
            measured_sum += sums[1]
    return param_sum, measured_sum


@njit(nogil=True, fastmath={"contract", "reassoc"})
def _sums_of_gradient(p, g, decay):
    param_sum, measured_sum = 0.0, 0.0
    for i in range(p.size):
        d = g[i] + decay * p[i]
        param_sum += np.float64(p[i]) * np.float64(p[i])
        measured_sum += np.float64(d) * np.float64(d)
    return param_sum, measured_sum


@njit(nogil=True, fastmath={"contract", "reassoc"})
def _sums_of_update(p, g, v, decay, kept, fresh):
    param_sum, measured_sum = 0.0, 0.0
    for i in range(p.size):
        u = kept * v[i] + fresh * (g[i] + decay * p[i])
        param_sum += np.float64(p[i]) * np.float64(p[i])
        measured_sum += np.float64(u) * np.float64(u)
    return param_sum, measured_sum


@njit(nogil=True)
def _update(p, g, v, options, param_norm, measured):
    """Move p and v, with v ← m v + scale · d and p ← p − rate · v, or Nesterov's."""
    decay, trust = options.weight_decay, 1.0
    if options.adapt:
        known = param_norm > 0 and measured > 0
        if options.form == LARC:
            measured += decay * param_norm + EPS
            if not known:
                decay = 0.0
        if known:
            trust = options.trust_coefficient * param_norm / measured
            if options.lr * trust > LARGEST:  # the norm of a gradient next to nothing, 0 in float32
                trust = 1.0
    if options.form == CLASSIC:
        scale, rate = options.lr * trust, 1.0
    elif options.form == NON_CLASSIC:
        scale, rate = 1.0, options.lr * trust
    else:
        scale, rate = trust, options.lr
    momentum, decay32 = np.float32(options.momentum), np.float32(decay)
    for first in range(0, p.size, BLOCK):
        last = min(first + BLOCK, p.size)
        block = (p[first:last], g[first:last], v[first:last])
        if options.nesterov:
            _move_nesterov(block[0], block[1], block[2], momentum, decay32, np.float32(scale), np.float32(rate))
        else:
            _move(block[0], block[1], block[2], momentum, decay32, np.float32(scale), np.float32(rate))


@njit(nogil=True, fastmath={"contract"})
def _move(p, g, v, momentum, decay, scale, rate):
    for i in range(p.size):
        kept = momentum * v[i] + scale * (g[i] + decay * p[i])
        v[i] = kept
        p[i] -= rate * kept


@njit(nogil=True, fastmath={"contract"})
def _move_nesterov(p, g, v, momentum, decay, scale, rate):
    for i in range(p.size):
        fresh = scale * (g[i] + decay * p[i])
        kept = momentum * v[i] + fresh
        v[i] = kept
        p[i] -= rate * (momentum * kept + fresh)


@intrinsic
def _pointer(typing_context, address):
    """What lies at `address`."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate
