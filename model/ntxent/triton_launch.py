"""NT-Xent on a GPU, in Triton: the two passes over the similarities, and the way from z to rows and back.

Rows are fp16, normalised always. Those of fp16 and bf16 inputs are rounded once. Those of fp32 inputs are sums of two
fp16 numbers, so that three products take the place of one: 22 bits, at half the cost of TF32 three times over. They
travel between ranks as they are. Any τ ≥ 1e-6 leaves them within fp16's range.

A program owns some rows and a stretch of the columns: S stretches make enough programs of few rows, and each of them
gives a part of the result. No result depends on the order in which programs run, and nothing waits for the device.

Shapes: N images, R = 2N rows of this rank, C columns, D width. A stored row is [parts, P], P ≥ D.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from model.ntxent import triton_kernels, triton_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # fp16 numbers of a stored row that are multiplied at a time; wider rows are walked in chunks
CHUNK = 64
PROCESSORS = 132  # of an H100: where there is no GPU to ask
SPREAD = 4  # so many programs for every processor are considered
START = 4  # what a program's start and end cost, in tiles: an estimate
ELEMENTS = 2048  # that a program has at a time which works row by row
MERGED_ROWS = 256
SURVEYED = 4096  # columns at a time
NOWHERE = -1


class Launch(NamedTuple):
    """One start of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """On the current stream of the first argument's device."""
        with torch.cuda.device_of(self.arguments[0]):  # type: ignore[no-untyped-call]
            self.kernel[self.grid](*self.arguments, **self.constants, **self.options)


class Tile(NamedTuple):
    """What a program holds of the similarities, and what it is compiled with."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def to_rows(
    z1: Tensor, z2: Tensor, temperature: float | Tensor, normalize: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """As `model.ntxent.float_rows.to_rows`: rows fp16 [R, parts, P], normalised; s of the positives, fp32 [R].

    Args:
        z1: projections of view 1 [N, D], of a dtype among DTYPES and with any strides.
        z2: projections of view 2, alike.
        temperature: τ.
        normalize: must be true: other rows may not fit fp16.
    """
    assert normalize
    rows = z1.new_empty(rows_shape(z1), dtype=torch.float16)
    positive = z1.new_empty(len(rows), dtype=torch.float32)
    rows_launch(z1, z2, _on(z1, temperature), rows, positive).run()
    return rows, positive, (z1, z2)


def rows_shape(z1: Tensor) -> tuple[int, int, int]:
    """[R, parts, P] of `to_rows`: P is a power of two, or whole outputs of the gradient's programs."""
    parts = 2 if z1.dtype == torch.float32 else 1
    dim, widest = z1.shape[1], WIDEST // parts
    padded = max(triton.next_power_of_2(dim), 16) if dim <= widest else _ceil(dim, widest) * widest
    return 2 * len(z1), parts, padded


def scan(rows: Tensor, columns: Tensor, first: int | None) -> tuple[Tensor, Tensor]:
    """As `model.ntxent.tiled.scan`, for rows [R, parts, P] and columns [C, parts, P] of `scaled_rows`."""
    lse, hardest = (rows.new_empty(len(rows), dtype=torch.float32) for _ in range(2))
    for launch in scan_launches(rows, columns, first, lse, hardest):
        launch.run()
    return lse, hardest


def gradient(rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None) -> Tensor:
    """As `model.ntxent.tiled.gradient`, in parts that are still to be added up: fp32 [S, R, P]."""
    sums = rows.new_empty(gradient_shape(rows, columns), dtype=torch.float32)
    for launch in gradient_launches(rows, columns, row_lse, column_lse, first, sums):
        launch.run()
    return sums


def to_input(
    sums: Tensor,
    u: Tensor,
    kept: tuple[Tensor, Tensor],
    margin: Tensor,
    upstream: Tensor,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor | None]:
    """As `model.ntxent.float_rows.to_input`, from the sums of `gradient`, in z's dtype."""
    z1, z2 = kept
    learned = isinstance(temperature, Tensor)
    grad = z1.new_empty((2 * len(z1), z1.shape[1]))
    temperature_grads = z1.new_empty(len(z1) if learned else 0, dtype=torch.float32)
    chain_launch(z1, z2, _on(z1, temperature), sums, margin, upstream, grad, temperature_grads).run()
    return grad, temperature_grads.sum() if learned else None


def rows_launch(z1: Tensor, z2: Tensor, temperature: float | Tensor, rows: Tensor, positive: Tensor) -> Launch:
    """Fills `rows` and `positive`."""
    num_images, dim = z1.shape
    constants = {"PARTS": rows.shape[1], **_row_by_row(rows.shape[2], temperature)}
    arguments = (z1, z2, temperature, rows, positive, num_images, dim, *z1.stride(), *z2.stride())
    grid = (_ceil(num_images, constants["BLOCK"]),)
    return Launch(triton_rows.rows_kernel, grid, arguments, constants, _num_warps(constants))


def scan_launches(
    rows: Tensor, columns: Tensor, first: int | None, lse: Tensor, hardest: Tensor
) -> tuple[Launch, Launch]:
    """Fill `lse` and `hardest`."""
    constants, tile = _scan_form(*rows.shape[1:])
    length, num_stretches = _stretches(rows, columns, tile, 1)
    maxima, sums = (rows.new_empty((num_stretches, len(rows)), dtype=torch.float32) for _ in range(2))
    arguments = (rows, columns, maxima, sums, len(rows), len(columns), NOWHERE if first is None else first, length)
    grid = (_blocks(rows, tile), num_stretches)
    scan = Launch(triton_kernels.scan_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)
    merged = (maxima, sums, lse, hardest, len(rows), num_stretches)
    num_merges = _ceil(len(rows), MERGED_ROWS)
    return scan, Launch(triton_kernels.merge_kernel, (num_merges,), merged, {"BLOCK": MERGED_ROWS})


def gradient_shape(rows: Tensor, columns: Tensor) -> tuple[int, int, int]:
    """[S, R, P] of `gradient`."""
    constants, tile = _gradient_form(*rows.shape[1:])
    _, num_stretches = _stretches(rows, columns, tile, rows.shape[2] // constants["OUT"])
    return num_stretches, len(rows), rows.shape[2]


def gradient_launches(
    rows: Tensor, columns: Tensor, row_lse: Tensor, column_lse: Tensor, first: int | None, sums: Tensor
) -> tuple[Launch, Launch]:
    """Fill `sums`."""
    shares, extent = (rows.new_empty(num, dtype=torch.float32) for num in (len(columns), 2))
    surveyed = (column_lse, shares, extent, len(columns))
    survey = Launch(triton_kernels.survey_kernel, (1,), surveyed, {"BLOCK": SURVEYED}, num_warps=16)
    constants, tile = _gradient_form(*rows.shape[1:])
    num_chunks = rows.shape[2] // constants["OUT"]
    length, num_stretches = _stretches(rows, columns, tile, num_chunks)
    own = NOWHERE if first is None else first
    lses = (row_lse, column_lse, shares, extent)
    arguments = (rows, columns, *lses, sums, len(rows), len(columns), own, length)
    grid = (_blocks(rows, tile), num_stretches, num_chunks)
    return survey, Launch(triton_kernels.gradient_kernel, grid, arguments, constants, tile.num_warps, tile.num_stages)


def chain_launch(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor,
    sums: Tensor,
    margin: Tensor,
    upstream: Tensor,
    grad: Tensor,
    temperature_grads: Tensor,
) -> Launch:
    """Fills `grad` and, if τ is a tensor, `temperature_grads` [N]."""
    num_images, dim = z1.shape
    constants = _row_by_row(sums.shape[2], temperature)
    strides = (*z1.stride(), *z2.stride())
    tensors = (z1, z2, temperature, sums, margin, upstream, grad, temperature_grads)
    grid = (_ceil(num_images, constants["BLOCK"]),)
    arguments = (*tensors, num_images, dim, *strides, len(sums))
    return Launch(triton_rows.chain_kernel, grid, arguments, constants, _num_warps(constants))


def _scan_form(parts: int, padded: int) -> tuple[dict[str, int], Tile]:
    """Tiles are as large as the registers and the shared memory of an A100 and an H100 allow."""
    chunk = padded if parts * padded <= WIDEST else CHUNK
    tile = Tile(128, 64, 8, 2 if parts == 2 or chunk == WIDEST else 3)
    if parts == 2 and chunk == padded:
        tile = Tile(128, 32, 8, 2)
    return _constants(parts, padded, chunk, tile), tile


def _gradient_form(parts: int, padded: int) -> tuple[dict[str, int], Tile]:
    """See `_scan_form`. Rows that are walked in chunks are walked again for every `OUT` numbers of the gradient."""
    whole = parts * padded <= WIDEST
    out = padded if whole else WIDEST // parts
    tile = Tile(64, 64, 8, 2) if out == WIDEST else Tile(128, 64, 8, 3)
    if parts == 2:
        tile = Tile(64, 32, 4, 2)
    return _constants(parts, padded, padded if whole else CHUNK, tile) | {"OUT": out}, tile


def _constants(parts: int, padded: int, chunk: int, tile: Tile) -> dict[str, int]:
    return {"PADDED": padded, "PARTS": parts, "CHUNK": chunk, "ROWS": tile.rows, "COLUMNS": tile.columns}


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _blocks(rows: Tensor, tile: Tile) -> int:
    """Programs for all rows; none has rows of both views."""
    return 2 * _ceil(len(rows) // 2, tile.rows)


def _stretches(rows: Tensor, columns: Tensor, tile: Tile, num_chunks: int) -> tuple[int, int]:
    """Columns of a stretch, and S."""
    processors = PROCESSORS
    if rows.is_cuda:
        processors = torch.cuda.get_device_properties(rows.device).multi_processor_count
    num_tiles = _ceil(int(columns.shape[0]), tile.columns)  # `int` of what may be symbolic, in a compiler
    length = stretch(int(_blocks(rows, tile) * num_chunks), num_tiles, processors)
    return length * tile.columns, _ceil(num_tiles, length)


@functools.cache
def stretch(num_blocks: int, num_tiles: int, processors: int) -> int:
    """Tiles of columns in a stretch, so that the programs of all blocks of rows are done soonest."""
    most = min(_ceil(SPREAD * processors, num_blocks), num_tiles)
    lengths = [_ceil(num_tiles, num_stretches) for num_stretches in range(1, most + 1)]

    def duration(length: int) -> tuple[int, int]:
        num_programs = num_blocks * _ceil(num_tiles, length)
        return _ceil(num_programs, processors) * (length + START), -length

    return min(lengths, key=duration)


def _on(z: Tensor, temperature: float | Tensor) -> float | Tensor:
    """τ where a kernel can read it."""
    return temperature.to(z.device) if isinstance(temperature, Tensor) else temperature


def _row_by_row(padded: int, temperature: float | Tensor) -> dict[str, Any]:
    lanes = triton.next_power_of_2(padded)
    block = max(ELEMENTS // lanes, 1)
    return {"PADDED": padded, "BLOCK": block, "LANES": lanes, "LEARNED": isinstance(temperature, Tensor)}


def _num_warps(constants: dict[str, Any]) -> int:
    """So that a thread has sixteen numbers of each view or more."""
    elements: int = constants["BLOCK"] * constants["LANES"]
    return min(max(elements // 512, 4), 16)
