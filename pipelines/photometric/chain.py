"""The photometric chain on a batch of crops: the entry that checks its input and picks an implementation.

The definition stands in `pipelines.photometric.reference`. `numba` runs it on the calling thread of the CPU, `triton`
on a GPU: uint8 in and the finished dtype out, in the fewest passes over memory.

Legend: N images, S the side.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.params import VIEW_PARAMS, ViewParams
from pipelines.photometric.reference import photometric
from pipelines.recipe import Recipe, ViewRecipe

Backend = Literal["auto", "reference", "numba", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


def photometric_chain(
    crops: Tensor,
    params: ViewParams,
    view: ViewRecipe,
    recipe: Recipe,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate → jitter → gray → blur → solarize → sobel → noise → cutout → normalise, as drawn for each image.

    Where a stencil follows, `triton` keeps intermediate values in float16 unless `dtype` is float32, and blurs with
    float16 weights: a blurred value is off by at most 1.3e-3 on [0, 1], beside the result's own rounding.

    Args:
        crops: uint8 [N, 3, S, S], any strides; channels_last is taken as it is, other formats are copied first.
        params: `VIEW_PARAMS` [N], on the host.
        view: the recipe of this view: what can occur, and the blur's kernel.
        recipe: mean and std.
        dtype: of the result: float32, bfloat16 or float16. The arithmetic is float32's.
        backend: "reference" (torch, any device), "numba" (CPU) or "triton" (CUDA); "auto" takes triton on a GPU,
            numba on the CPU, the reference elsewhere.

    Returns:
        [N, 3, S, S] in channels_last memory on the crops' device, normalised.

    Raises:
        ValueError: shapes, dtypes or a backend that do not fit.
    """
    _check(crops, params, view, dtype)
    if backend == "auto":
        backend = _choose(crops.device.type)
    if backend == "reference":
        return photometric(crops, params, view, recipe).to(dtype, memory_format=torch.channels_last)
    if backend == "numba":
        if crops.device.type != "cpu":
            raise ValueError(f"`backend` 'numba' works on CPU tensors, got {crops.device}; use 'triton' or 'reference'")
        return _numba(crops, params, view, recipe).to(dtype)
    if backend == "triton":
        if crops.device.type != "cuda":
            raise ValueError(f"`backend` 'triton' works on CUDA tensors, got {crops.device}; use 'numba'")
        from pipelines.photometric.triton_launch import photometric_triton

        return photometric_triton(crops, params, view, recipe, dtype)
    raise ValueError(f"`backend` must be 'auto', 'reference', 'numba' or 'triton', got {backend!r}")


def _numba(crops: Tensor, params: ViewParams, view: ViewRecipe, recipe: Recipe) -> Tensor:
    from pipelines.photometric.numba_kernels import photometric_batch

    pixels = crops.permute(0, 2, 3, 1).contiguous().numpy()
    out = np.empty(pixels.shape, np.float32)
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    photometric_batch(pixels, np.ascontiguousarray(params), view.blur_kernel, mean, std, out)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _check(crops: Tensor, params: ViewParams, view: ViewRecipe, dtype: torch.dtype) -> None:
    shape = tuple(crops.shape)
    if crops.dtype != torch.uint8 or len(shape) != 4 or shape[1:] != (3, view.size, view.size):
        raise ValueError(
            f"`crops` must be uint8 [N, 3, {view.size}, {view.size}] for a view of this size, got {crops.dtype} "
            f"{list(shape)}"
        )
    if params.dtype != VIEW_PARAMS or params.shape != shape[:1]:
        raise ValueError(f"`params` must be VIEW_PARAMS [{shape[0]}], one for each crop, got shape {params.shape}")
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")


@functools.cache  # logged once for each device, not for every batch
def _choose(device: str) -> Backend:
    backend: Backend = {"cuda": "triton", "cpu": "numba"}.get(device, "reference")  # type: ignore[assignment]
    logger.info("photometric chain: %s (%s)", backend, device)
    return backend
