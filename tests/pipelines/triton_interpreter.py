"""Run the input pipeline's GPU kernels on the CPU, in Triton's interpreter."""

import numpy as np
import torch

from tests.native.triton_interpreter import process
from tests.pipelines.triton_inputs import unaligned

LAYOUTS = {
    "channels_last": lambda crops: crops.contiguous(memory_format=torch.channels_last),
    "channels_first": lambda crops: crops,
    "every second row": lambda crops: crops.repeat_interleave(2, dim=2)[:, :, ::2],
    "unaligned": unaligned,
}


def photometric(crops, params, view, recipe, dtype=torch.float32, *, layout="channels_last", **options):
    """`photometric_triton` of crops that lie in one of `LAYOUTS`; the result is float64."""
    out = process().submit(_photometric, crops.numpy(), layout, params, view, recipe, dtype, options).result()
    return torch.from_numpy(out)


def crop_resize(images, params, view):
    """`crop_resize_triton` of pixels, offsets and widths."""
    arrays = [tensor.numpy() for tensor in images[:3]]
    return torch.from_numpy(process().submit(_crop_resize, arrays, params, view).result())


def blur_weights(params, view):
    """The matrices [N, S, S] that blur one axis in float16, as their bands give them; float64."""
    return process().submit(_blur_weights, params, view).result()


def _photometric(crops, layout, params, view, recipe, dtype, options):
    from pipelines.photometric.triton_launch import photometric_triton

    crops = LAYOUTS[layout](torch.from_numpy(crops))
    out = photometric_triton(crops, params, view, recipe, dtype, **options)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out.double().numpy()


def _blur_weights(params, view):
    from pipelines.photometric.triton_launch import TILE, WINDOW, launches
    from pipelines.recipe import Recipe

    crops = torch.zeros((len(params), 3, view.size, view.size), dtype=torch.uint8)
    recipe = Recipe(views=(view,))
    first = next(launches(crops, params, view, recipe, torch.empty_like(crops, dtype=torch.float16)))
    first.run()
    bands = first.arguments[1].double().numpy()
    matrices = np.zeros((len(params), bands.shape[1] * TILE, view.size))
    for tile in range(bands.shape[1]):
        start = max(min(TILE * tile - (WINDOW - TILE) // 2, view.size - WINDOW), 0)
        matrices[:, TILE * tile : TILE * (tile + 1), start : start + WINDOW] = bands[:, tile]
    return matrices[:, : view.size]


def _crop_resize(arrays, params, view):
    from pipelines.geometry.crop_resize_triton import crop_resize_triton

    out = crop_resize_triton(*(torch.from_numpy(array) for array in arrays), params, view)
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out.numpy()
