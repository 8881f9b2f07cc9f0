"""Crop and resize on a GPU, against torchvision in float64."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.draw import draw_views
from pipelines.geometry.crop_resize import PackedImages, crop_resize
from pipelines.photometric.chain import photometric_chain
from pipelines.recipe import Recipe, ViewRecipe
from tests.gpu.waiting import no_waiting
from tests.pipelines.triton_inputs import COLOURS, packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALF_A_LEVEL = 0.502  # a level's rounding, and what float32's weights and sums can add
SIZES = [(500, 375), (32, 32), (333, 500), (1, 1), (3, 5), (20_000, 2), (3, 20_000), (1200, 900), (41, 57)]


def drawn(images, view, seed=0):
    recipe = Recipe(views=(view,))
    widths, heights = (tensor.numpy() for tensor in images[2:])
    return draw_views(recipe, seed, 0, np.arange(len(widths)), widths, heights)[:, 0]


def exact(images, params, view):
    """torchvision's crops in float64, within the range of a byte."""
    pixels, offsets, widths, heights = images
    crops = []
    for offset, width, height, window in zip(offsets.tolist(), widths.tolist(), heights.tolist(), params, strict=True):
        image = pixels[offset : offset + height * width * 3].view(height, width, 3).permute(2, 0, 1)
        box = [int(window[name]) for name in ("top", "left", "height", "width")]
        mode = InterpolationMode(view.interpolation)
        crop = F.resized_crop(image.double(), *box, [view.size] * 2, mode, antialias=True)
        crops.append(crop.flip(-1) if window["flip"] else crop)
    return torch.stack(crops).clamp(0, 255)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 41, 96, 224])
def test_crops_are_torchvisions_rounded_once(size, interpolation, backend):
    # torch's own GPU kernel holds a filter in shared memory: no panoramas for it.
    images = packed([(w, h) for w, h in SIZES if backend == "triton" or max(w, h) < 1000])
    for crop in ("random_resized", "whole"):
        view = ViewRecipe(size=size, crop=crop, interpolation=interpolation, flip_prob=0.5)
        params = drawn(images, view)
        ours = crop_resize(PackedImages(*(tensor.cuda() for tensor in images)), params, view, backend)
        assert ours.is_cuda
        assert ours.dtype == torch.uint8
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours.double().cpu() - exact(images, params, view)).abs().max() < HALF_A_LEVEL


def test_the_same_bits_every_time_and_alone():
    images = packed(SIZES)
    on_gpu = [tensor.cuda() for tensor in images]
    view = ViewRecipe(size=96)
    params = drawn(images, view)
    together = crop_resize(PackedImages(*on_gpu), params, view)
    assert torch.equal(together, crop_resize(PackedImages(*on_gpu), params, view))
    for i in range(len(SIZES)):
        part = PackedImages(on_gpu[0], *(tensor[i : i + 1] for tensor in on_gpu[1:]))
        assert torch.equal(together[i : i + 1], crop_resize(part, params[i : i + 1], view))


def test_pixels_beyond_two_gigabytes():
    begin = 2**31 + 12_345
    pixels, offsets, widths, heights = packed([(50, 40)])
    far = torch.zeros(begin + len(pixels), dtype=torch.uint8, device="cuda")
    far[begin:] = pixels.cuda()
    view = ViewRecipe(size=32)
    params = drawn((pixels, offsets, widths, heights), view)
    near = crop_resize(PackedImages(*(t.cuda() for t in (pixels, offsets, widths, heights))), params, view)
    images = PackedImages(far, (offsets + begin).cuda(), widths.cuda(), heights.cuda())
    assert torch.equal(crop_resize(images, params, view), near)


def test_from_packed_pixels_to_views_without_waiting():
    images = packed([(32, 32)] * 64)
    on_gpu = PackedImages(*(tensor.cuda() for tensor in images))
    view = ViewRecipe(size=32, flip_prob=0.5, **COLOURS)
    recipe = Recipe(views=(view,))
    params = drawn(images, view)

    def views():
        return photometric_chain(crop_resize(on_gpu, params, view), params, view, recipe, torch.bfloat16)

    expected = views()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        ours = views()
    assert torch.equal(ours, expected)
    crops = crop_resize(PackedImages(*images), params, view)
    on_cpu = photometric_chain(crops, params, view, recipe)
    # A crop may be a level off where it lies between two, and hue and contrast magnify that.
    assert ((ours.float().cpu() - on_cpu).abs() > 2**-8).float().mean() < 0.03
