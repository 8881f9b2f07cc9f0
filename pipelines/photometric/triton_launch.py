"""Start the photometric chain's GPU kernels: pack the parameters, and the launches that a batch needs.

Images are sorted by what they need, which is known on the host. One that needs no stencil goes from uint8 to the
finished view in one launch. The others pass through planes that are small enough to stay in the GPU's cache, group
after group. Nothing here waits for the device.

Legend: N images, S the side; a row is an image's packed parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from pipelines.params import CONTRAST, NUM_JITTER_OPS, ViewParams
from pipelines.photometric import triton_blur, triton_kernels
from pipelines.photometric import triton_pixels as columns
from pipelines.photometric.reference import to_device
from pipelines.recipe import Recipe, ViewRecipe

BLOCK, BLOCKS_PER_SPAN = 1024, 4  # pixels; a span shares the reading of the parameters
TILE, WINDOW = (
    16,
    32,
)  # sides of the squares that a blurring program makes and reads at a time: as much as one warp can hold
STRIP = 4  # such squares of a program
AXIS_TILE = 32  # of a program that blurs along one axis
SOBEL_BLOCK = 512
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Without stages that run ahead: those would read past the processor's own cache, where neighbouring squares meet.
BLUR_OPTIONS = OPTIONS | {"num_stages": 1}
# Of one buffer of planes. An H100's cache is two partitions of 25 MiB, and what all its processors read may lie in
# both: two buffers fit into one of them, or one buffer beside the crops and the views that pass by.
PLANES_BYTES = 10 * 2**20
# The blur's weights end where the rest is below the planes' rounding: at so many sigmas.
REACH = {torch.float16: 4.0, torch.float32: 5.7}


class Launch(NamedTuple):
    """One start of a kernel."""

    kernel: Any
    num_programs: int
    arguments: tuple[Tensor | int, ...]
    constants: dict[str, Any]
    options: dict[str, Any] = OPTIONS

    def run(self) -> None:
        """On the current device and stream."""
        self.kernel[(self.num_programs,)](*self.arguments, **self.constants, **self.options)


def photometric_triton(
    crops: Tensor,
    params: ViewParams,
    view: ViewRecipe,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
    planes_bytes: int = PLANES_BYTES,
) -> Tensor:
    """Apply the chain: arguments and result as `pipelines.photometric.chain.photometric_chain`'s, on a GPU.

    On the current stream, without waiting for it. The same input gives the same bits, whatever `planes_bytes` is: the
    size of a buffer of planes.
    """
    num, _, size, _ = crops.shape
    out = torch.empty((num, 3, size, size), dtype=dtype, device=crops.device, memory_format=torch.channels_last)
    if num > 0:
        crops = crops.contiguous(memory_format=torch.channels_last)
        if crops.data_ptr() % 4 != 0:
            crops = crops.clone()  # new memory is aligned
        with torch.cuda.device(crops.get_device()):
            for launch in launches(crops, params, view, recipe, out, planes_bytes):
                launch.run()
    return out


def launches(
    crops: Tensor,
    params: ViewParams,
    view: ViewRecipe,
    recipe: Recipe,
    out: Tensor,
    planes_bytes: int = PLANES_BYTES,
) -> Iterator[Launch]:
    """What has to run, in order, to fill `out` [N ≥ 1, 3, S, S].

    Both tensors are in channels_last memory, and `crops` aligned to 4 bytes.
    """
    planes_dtype = torch.float32 if out.dtype == torch.float32 else torch.float16
    size = crops.shape[-1]
    blurred = (params["blur_sigma"] > 0.0) & (view.blur_prob > 0.0) & (view.blur_kernel > 1)
    sobel = params["sobel"] & (view.sobel_prob > 0.0)
    kind = np.where(sobel, np.where(blurred, 2, 3), blurred)  # direct, blurred, both, sobel: each is one run of rows
    order = np.argsort(kind, kind="stable")
    num_direct, num_blurred, num_both, num_sobel = np.bincount(kind, minlength=4).tolist()
    at_once = planes_dtype == torch.float16 and blurs_at_once(params, view)
    rows = to_device(pack(params, order, view, REACH[planes_dtype]), crops.device)

    num_spans = triton.next_power_of_2(triton.cdiv(size * size, BLOCK * BLOCKS_PER_SPAN))
    spans = {"SPAN": BLOCK * BLOCKS_PER_SPAN, "NUM_SPANS": num_spans, "BLOCK": BLOCK, "PACKED": size % 2 == 0}
    finish = {
        "SOLARIZE": view.solarize_prob > 0.0,
        "NOISE": view.noise_prob > 0.0,
        "FILL": view.cutout_prob > 0.0,
        "SCALE": tuple(1.0 / std for std in recipe.std),
        "SHIFT": tuple(-mean / std for mean, std in zip(recipe.mean, recipe.std, strict=True)),
    }
    point = spans | finish
    point |= {"JITTER": view.jitter_prob > 0.0, "GRAYSCALE": view.gray_prob > 0.0, "ROTATE": view.rotate_prob > 0.0}
    sums = torch.empty((len(order), num_spans), dtype=torch.float32, device=crops.device)
    if point["JITTER"] and (params["jitter_order"] == CONTRAST).any():
        yield Launch(triton_kernels.luma_sums_kernel, len(order) * num_spans, (crops, rows, sums, size), spans)

    per_group = max(1, planes_bytes // (3 * size * size * planes_dtype.itemsize))
    # Buffers are allocated one by one: each is aligned then, whatever the number and the size of the images.
    planes = torch.empty(
        (min(per_group, len(order) - num_direct), 3, size, size), dtype=planes_dtype, device=out.device
    )
    spare = torch.empty_like(planes) if num_both or (num_blurred and not at_once) else planes
    weights = None
    if at_once and num_blurred + num_both:
        shape = (num_blurred + num_both, triton.cdiv(size, TILE), TILE, WINDOW)
        weights = torch.empty(shape, dtype=torch.float16, device=out.device)
        tile = {"TILE": TILE, "WINDOW": WINDOW}
        to_weights = (rows, weights, size, num_direct)
        yield Launch(triton_blur.blur_weights_kernel, shape[0] * shape[1], to_weights, tile, OPTIONS | {"num_warps": 1})
    ends = np.cumsum([num_direct, num_blurred, num_both, num_sobel]).tolist()
    for run_kind, (begin, end) in enumerate(pairwise(ends), start=1):
        for first in range(begin, end, per_group):
            count = min(per_group, end - first)
            staged = (crops, rows, sums, planes, size, first)
            yield Launch(triton_kernels.points_kernel, count * num_spans, staged, point | {"FINISH": False})
            result = planes
            if run_kind != 3:
                result = out if run_kind == 1 else planes if weights is None else spare
                part = None if weights is None else weights[first - num_direct :]
                yield from _blur(planes, spare, result, part, rows, first, count, finish | {"FINISH": run_kind == 1})
            if run_kind != 1:
                blocks = triton.cdiv(size * size, SOBEL_BLOCK)
                constants = finish | {"BLOCK": SOBEL_BLOCK}
                yield Launch(triton_kernels.sobel_kernel, count * blocks, (result, rows, out, size, first), constants)
    if num_direct:
        direct = (crops, rows, sums, out, size, 0)
        yield Launch(triton_kernels.points_kernel, num_direct * num_spans, direct, point | {"FINISH": True})


def _blur(
    planes: Tensor,
    spare: Tensor,
    out: Tensor,
    weights: Tensor | None,
    rows: Tensor,
    first: int,
    count: int,
    constants: dict[str, Any],
) -> Iterator[Launch]:
    """Blur `count` slots of `planes` into `out`: at once where there are weights, else axis by axis through `spare`."""
    size = planes.shape[-1]
    if weights is None:
        num_programs = count * triton.cdiv(size, AXIS_TILE) ** 2
        constants = constants | {"TILE": AXIS_TILE}
        there, back = (planes, rows, spare, size, first), (spare, rows, out, size, first)
        yield Launch(triton_blur.blur_axis_kernel, num_programs, there, constants | {"FINISH": False})
        yield Launch(triton_blur.blur_axis_kernel, num_programs, back, constants)
    else:
        num_tiles = triton.cdiv(size, TILE)
        num_programs = count * num_tiles * triton.cdiv(num_tiles, STRIP)
        constants = constants | {"TILE": TILE, "WINDOW": WINDOW, "STRIP": STRIP, "ALIGN": math.gcd(size, 16)}
        arguments = (planes, rows, weights, out, size, first)
        num_warps = 1 if size % 16 == 0 else 2  # where rows are not aligned, addresses take many registers
        options = BLUR_OPTIONS | {"num_warps": num_warps}
        yield Launch(triton_blur.blur_kernel, num_programs, arguments, constants, options)


def blurs_at_once(params: ViewParams, view: ViewRecipe) -> bool:
    """Whether every blur that the view can draw stays within a tile's window, so that its float16 form may be used.

    Raises:
        ValueError: the parameters blur more than the view can draw.
    """
    strongest, most = params["blur_sigma"].max(initial=0.0), view.blur_sigma[1]
    if strongest > np.float32(most):
        raise ValueError(
            f"`params` must be drawn from this view, whose `blur_sigma` is at most {most}, got {strongest}"
        )
    radius = min(math.ceil(REACH[torch.float16] * most), view.blur_kernel // 2)
    return TILE + 2 * radius <= WINDOW


def pack(params: ViewParams, order: NDArray[np.intp], view: ViewRecipe, reach: float) -> NDArray[np.int32]:
    """Rows for the images `order`: int32 [N, NUM_WORDS], in the columns of `triton_pixels`."""
    params = params[order]
    rows = np.zeros((len(params), columns.NUM_WORDS.value), np.int32)
    floats = rows.view(np.float32)

    steps = params["jitter_order"]
    applied = steps >= 0
    place = np.cumsum(applied, axis=1) - 1  # without the steps that do nothing
    rows[:, columns.IMAGE.value] = order
    rows[:, columns.NUM_STEPS.value] = applied.sum(axis=1)
    contrast = steps == CONTRAST
    contrast_place = np.where(contrast, place, 0).sum(axis=1)
    rows[:, columns.CONTRAST_STEP.value] = np.where(contrast.any(axis=1), contrast_place, -1)
    rows[:, columns.ORDER.value] = np.where(applied, steps << (8 * np.maximum(place, 0)), 0).sum(axis=1)
    factors = slice(columns.FACTOR.value, columns.FACTOR.value + NUM_JITTER_OPS)
    floats[:, factors] = params["jitter_factor"]
    rows[:, columns.GRAY.value] = params["gray"]

    sigma = np.where(params["blur_sigma"] > 0.0, params["blur_sigma"], 1.0).astype(np.float64)
    rows[:, columns.BLUR_RADIUS.value] = np.minimum(np.ceil(reach * sigma), view.blur_kernel // 2)
    floats[:, columns.BLUR_FALLOFF.value] = np.maximum(-0.5 / sigma**2, np.finfo(np.float32).min)
    floats[:, columns.SOLARIZE_THRESHOLD.value] = params["solarize_threshold"]
    rows[:, columns.QUARTER_TURNS.value] = params["quarter_turns"]
    floats[:, columns.NOISE_STD.value] = params["noise_std"]
    rows[:, columns.NOISE_KEY.value] = (params["noise_key"] & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    rows[:, columns.NOISE_KEY.value + 1] = (params["noise_key"] >> np.uint64(32)).astype(np.uint32).view(np.int32)
    for i, name in enumerate(("top", "left", "height", "width")):
        rows[:, columns.CUTOUT.value + i] = params[f"cutout_{name}"]
    return rows
