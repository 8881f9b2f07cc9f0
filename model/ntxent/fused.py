"""NT-Xent's two passes over the similarities on the CPU in fp32: compiled kernels, each thread on a tile of its own.

The same `scan` and `gradient` as `model.ntxent.tiled`. A pair of this rank's rows is computed once for both. What a row
receives is added up in one order, whatever the number of threads: results are equal bit for bit.

Memory beside what the caller holds: one rank's columns in another order [R, D], and 256 KiB a thread. Where D is no
multiple of a panel's width (32 with AVX-512, else 16), padded rows come on top.

Shapes: R rows of this rank; C columns, blocks of R rows of one rank each; D width.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.ntxent.numba_kernels import LOWEST, STRIP, kernels, panel_width
from native.simd import NUM_LANES

Tile = tuple[int, int, int, int]
"""First row, last row + 1, first column, last column + 1."""
Floats = NDArray[np.float32]

LARGE_TILE, SMALL_TILE = 512, 256  # sides
SAFE_BOUND = 40.0
"""For |s| up to this bound, e^(s − bound) ≥ e^−80 and e^(bound − L) ≤ e^80 are ordinary float32 numbers."""
CACHE_LINE = 64  # bytes


def scan(rows: Tensor, columns: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
    """Per row [R]: log-sum-exp and maximum of s over the negatives among the columns; −∞ where there are none.

    Args:
        rows: u of this rank, fp32 [R, D] on the CPU.
        columns: u of ranks, fp32 [C, D].
        first: where this rank's rows start among the columns, None if they are not there. There, a row itself and its
            positive are no negatives.
    """
    scan_tile, _ = kernels()
    num_rows = len(rows)
    bound, shared = _bound(rows, columns)
    by_row = _filled(0.0, num_rows, NUM_LANES), _filled(LOWEST, num_rows, NUM_LANES)
    whole_vectors = num_rows + -num_rows % NUM_LANES
    by_column = _filled(0.0, whole_vectors), _filled(LOWEST, whole_vectors)
    u = _padded(rows)
    for start in range(0, len(columns), num_rows):
        own = start == first
        packed = _packed(u if own else _padded(columns[start : start + num_rows]))
        arguments = u, packed, own, shared, bound, *by_row, *by_column
        _walk(num_rows, own, functools.partial(scan_tile, *arguments))
    sums, maxima = (
        np.column_stack((met, met_as_column[:num_rows])) for met, met_as_column in zip(by_row, by_column, strict=True)
    )
    hardest = maxima.max(1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # no negatives: log 0; inf and NaN go on
        if shared:
            lse = np.log(sums.sum(1, dtype=np.float64)) + bound
        else:
            lse = np.log((sums * np.exp(maxima - hardest[:, None])).sum(1, dtype=np.float64)) + hardest
    hardest[hardest == LOWEST] = -np.inf
    return torch.from_numpy(lse.astype(np.float32)), torch.from_numpy(hardest)


def gradient(rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None) -> Tensor:
    """Σ_j (e^{s_ij − L_i} + e^{s_ij − L_j}) u_j over the negatives among the columns [R, D].

    Args:
        rows: as `scan`'s.
        columns: as `scan`'s.
        row_lse: L of the rows [R].
        column_lse: L of the columns [C].
        first: as `scan`'s.
    """
    _, gradient_tile = kernels()
    num_rows = len(rows)
    bound, shared = _bound(rows, columns)
    row_terms, column_terms = (np.exp(bound - lse) if shared else lse for lse in (row_lse.numpy(), column_lse.numpy()))
    u = _padded(rows)
    grad = _filled(0.0, *u.shape)
    for start in range(0, len(columns), num_rows):
        own = start == first
        block = u if own else _padded(columns[start : start + num_rows])
        terms = np.pad(column_terms[start : start + num_rows], (0, -num_rows % NUM_LANES))
        arguments = u, _packed(block), own, shared, bound, block, row_terms, terms, grad
        _walk(num_rows, own, functools.partial(gradient_tile, *arguments))
    return torch.from_numpy(np.ascontiguousarray(grad[:, : rows.shape[1]]))


def _bound(rows: Tensor, columns: Tensor) -> tuple[np.float32, bool]:
    """What no |s| exceeds, and whether exponents may be relative to it; NaN and inf may not."""
    contiguous = map(np.ascontiguousarray, (rows.numpy(), columns.numpy()))  # one order of summation
    squares = (np.einsum("rd,rd->r", u, u).max() for u in contiguous)
    bound = np.sqrt(np.prod([np.float64(square) for square in squares]))
    return np.float32(bound), bool(bound <= SAFE_BOUND)


def _padded(rows: Tensor) -> Floats:
    """Rows [R, D] with zeros to the width of whole panels; themselves where they have it."""
    assert rows.dtype == torch.float32, f"the kernels read float32, got {rows.dtype}"
    u = rows.numpy()
    missing = -u.shape[1] % panel_width()
    if not missing:
        return np.ascontiguousarray(u)
    padded = _filled(0.0, len(u), u.shape[1] + missing)
    padded[:, : u.shape[1]] = u
    return padded


def _packed(u: Floats) -> Floats:
    """Rows u [R, D] in panels [R / width, D, width], zero beyond R."""
    num_rows, dim = u.shape
    width = panel_width()
    num_whole = num_rows // width
    panels = _filled(0.0, -(-num_rows // width), dim, width)
    panels[:num_whole] = u[: num_whole * width].reshape(-1, width, dim).transpose(0, 2, 1)
    if num_rows % width:
        panels[-1, :, : num_rows % width] = u[num_whole * width :].T
    return panels


def _walk(num_rows: int, own: bool, work: Callable[[Tile, Floats], object]) -> None:
    """Call `work` with each tile of M × M similarities, or where `own` those on the diagonal and above it.

    Tiles come in rounds, in each of which a row or column stands in at most one tile. Those that have rows or columns
    in common, their results too, follow each other in that order; others run at the same time.
    """
    side = LARGE_TILE if num_rows >= 16 * LARGE_TILE else SMALL_TILE
    num_spans = -(-num_rows // side)
    pairs = [(i, j) for i in range(num_spans) for j in range(i if own else 0, num_spans)]
    pairs.sort(key=lambda pair: sum(pair) % num_spans)
    num_threads = min(torch.get_num_threads(), -(-num_spans // 2))
    scratch = deque(_filled(0.0, min(side, num_rows), STRIP) for _ in range(num_threads))

    def run(pair: tuple[int, int], before: Iterable[Future[None]]) -> None:
        for future in before:
            future.result()
        s = scratch.pop()
        (r0, r1), (c0, c1) = ((span * side, min((span + 1) * side, num_rows)) for span in pair)
        work((r0, r1, c0, c1), s)
        scratch.append(s)

    if num_threads == 1:
        for pair in pairs:
            run(pair, ())
        return
    # Threads of this call alone: none are left for a fork to lose. They take the tiles as listed, so that what a tile
    # waits for has begun.
    with ThreadPoolExecutor(num_threads, thread_name_prefix="ntxent") as pool:
        latest: dict[int, Future[None]] = {}
        for pair in pairs:
            future = pool.submit(run, pair, [latest[span] for span in pair if span in latest])
            latest.update(dict.fromkeys(pair, future))
    for future in latest.values():
        future.result()


def _filled(value: float | np.float32, *shape: int) -> Floats:
    """A float32 array that begins with a cache line, so that its vectors do not straddle two."""
    size = math.prod(shape)
    memory = np.full(size + CACHE_LINE // 4, value, np.float32)
    skipped = -memory.ctypes.data % CACHE_LINE // 4
    return memory[skipped : skipped + size].reshape(shape)
