"""Crop and resize of packed images: the reference against torchvision, the GPU kernel (in Triton's interpreter) too."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.decode.resample import FILTERS
from pipelines.draw import draw_views
from pipelines.geometry.crop_resize import PackedImages, crop_resize
from pipelines.photometric.chain import photometric_chain
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines import triton_interpreter
from tests.pipelines.test_resample import crop as decoders_crop
from tests.pipelines.triton_inputs import packed, view_params

# A level's rounding, and what float32's weights and sums can add.
HALF_A_LEVEL = 0.502
INTERPOLATIONS = ["bilinear", "bicubic"]


def by_reference(images, params, view):
    return crop_resize(PackedImages(*images), params, view, backend="reference")


IMPLEMENTATIONS = {"reference": by_reference, "triton": triton_interpreter.crop_resize}


def image(images, i):
    """Image i of packed ones, uint8 [3, H, W]."""
    pixels, offsets, widths, heights = images
    height, width, offset = int(heights[i]), int(widths[i]), int(offsets[i])
    return pixels[offset : offset + height * width * 3].view(height, width, 3).permute(2, 0, 1)


def exact(images, params, view):
    """torchvision's crops in float64, within the range of a byte."""
    crops = []
    for i, window in enumerate(params):
        crop = F.resized_crop(
            image(images, i).double(),
            *(int(window[name]) for name in ("top", "left", "height", "width")),
            [view.size, view.size],
            InterpolationMode(view.interpolation),
            antialias=True,
        )
        crops.append(crop.flip(-1) if window["flip"] else crop)
    return torch.stack(crops).clamp(0, 255)


def windows(*boxes, flip=False):
    """Parameters with windows (top, left, height, width)."""
    top, left, height, width = np.array(boxes).T
    return view_params(len(boxes), top=top, left=left, height=height, width=width, flip=flip)


def check(images, params, view, implementation):
    ours = IMPLEMENTATIONS[implementation](images, params, view)
    assert ours.dtype == torch.uint8
    assert (ours.double() - exact(images, params, view)).abs().max() < HALF_A_LEVEL
    return ours


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [11, 32, 41])
def test_crops_are_torchvisions_rounded_once(size, interpolation, implementation):
    images = packed([(50, 37), (50, 37), (32, 32), (90, 64), (3, 5), (1, 1)])
    params = windows((0, 0, 37, 50), (10, 20, 5, 30), (3, 2, 29, 20), (31, 0, 20, 90), (1, 0, 2, 3), (0, 0, 1, 1))
    params["flip"][1::2] = True
    check(images, params, ViewRecipe(size=size, interpolation=interpolation), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_view_of_one_pixel(implementation):
    check(packed([(15, 12)]), windows((1, 2, 9, 12)), ViewRecipe(size=1), implementation)


@pytest.mark.parametrize(
    ("implementation", "length"),
    [("reference", 20_000), ("triton", 3_000), pytest.param("triton", 20_000, marks=pytest.mark.slow)],
)
def test_panoramas(implementation, length):
    images = packed([(length, 2), (3, length // 10)])
    params = windows((0, 0, 2, length), (0, 1, length // 10, 2))
    check(images, params, ViewRecipe(size=8), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_outside_the_window_bleeds_in(implementation):
    pixels, offsets, widths, heights = packed([(60, 60)])
    pixels[:] = 0
    image((pixels, offsets, widths, heights), 0)[:, 20:40, 20:40] = 200
    view = ViewRecipe(size=7, interpolation="bicubic")
    crop = IMPLEMENTATIONS[implementation]((pixels, offsets, widths, heights), windows((20, 20, 20, 20)), view)
    assert (crop == 200).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_window_of_the_outputs_size_is_copied(interpolation, implementation):
    images = packed([(50, 40), (50, 40)])
    params = windows((3, 5, 32, 32), (8, 18, 32, 32))
    params["flip"][1] = True
    ours = IMPLEMENTATIONS[implementation](images, params, ViewRecipe(size=32, interpolation=interpolation))
    assert torch.equal(ours[0], image(images, 0)[:, 3:35, 5:37])
    assert torch.equal(ours[1], image(images, 1)[:, 8:40, 18:50].flip(-1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_cpus_decoder_cuts_the_same_crops(interpolation, implementation):
    sizes = [(50, 37), (64, 90), (33, 33)]
    images = packed(sizes)
    view = ViewRecipe(size=24, interpolation=interpolation, flip_prob=0.5)
    params = draw_views(Recipe(views=(view,)), 0, 0, np.arange(3), images[2].numpy(), images[3].numpy())[:, 0]
    ours = IMPLEMENTATIONS[implementation](images, params, view).permute(0, 2, 3, 1).numpy()
    truth = exact(images, params, view).permute(0, 2, 3, 1).numpy()
    for i, window in enumerate(params):
        box = [int(window[name]) for name in ("top", "left", "height", "width")]
        pixels = image(images, i).permute(1, 2, 0).numpy()
        expected = decoders_crop(pixels, box, 24, flip=bool(window["flip"]), kind=FILTERS[interpolation])
        # They round alike, but where a value lies half-way between two levels to float32's last bits.
        differ = ours[i] != expected
        assert (np.abs(ours[i].astype(int) - expected) <= 1).all()
        assert (np.abs(truth[i][differ] % 1 - 0.5) < HALF_A_LEVEL - 0.5).all()


def test_an_image_alone_is_bit_equal_to_itself_in_a_batch():
    images = packed([(50, 37), (40, 80), (33, 33)])
    params = windows((0, 0, 37, 50), (3, 4, 60, 30), (1, 2, 3, 4))
    view = ViewRecipe(size=33)
    together = triton_interpreter.crop_resize(images, params, view)
    for i in range(3):
        part = (images[0], *(tensor[i : i + 1] for tensor in images[1:]))
        assert torch.equal(together[i : i + 1], triton_interpreter.crop_resize(part, params[i : i + 1], view))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_images(implementation):
    images = packed([(5, 5)])
    none = (images[0], *(tensor[:0] for tensor in images[1:]))
    assert IMPLEMENTATIONS[implementation](none, view_params(0), ViewRecipe(size=32)).shape == (0, 3, 32, 32)


def test_one_image_many_times_feeds_the_photometric_chain():
    pixels, offsets, widths, heights = packed([(64, 48)])
    images = PackedImages(pixels, *(tensor.repeat(3) for tensor in (offsets, widths, heights)))
    params = windows((0, 0, 48, 64), (0, 0, 20, 20), (5, 6, 30, 40))
    view = ViewRecipe(size=32)
    crops = crop_resize(images, params, view)
    views = photometric_chain(crops, params, view, Recipe(views=(view,)))
    torch.testing.assert_close(views, crops / 255.0, rtol=0, atol=1e-6)


def test_the_entry_says_what_does_not_fit():
    pixels, offsets, widths, heights = packed([(5, 5), (6, 6)])
    images, view = PackedImages(pixels, offsets, widths, heights), ViewRecipe(size=8)
    params = windows((0, 0, 5, 5), (0, 0, 6, 6))
    with pytest.raises(ValueError, match="'triton' works on CUDA tensors, got cpu; use 'reference'"):
        crop_resize(images, params, view, backend="triton")
    with pytest.raises(ValueError, match=r"`backend` must be .*, got 'numba'"):
        crop_resize(images, params, view, backend="numba")
    with pytest.raises(ValueError, match=r"VIEW_PARAMS \[2\], one an image, got \(1,\)"):
        crop_resize(images, params[:1], view)
    with pytest.raises(ValueError, match=r"`offsets` .* torch.int64 \[2\] on cpu, got torch.int32 \[2\]"):
        PackedImages(pixels, offsets.int(), widths, heights)
    with pytest.raises(ValueError, match=r"`heights` .* torch.int32 \[2\] on cpu, got torch.int32 \[1\]"):
        PackedImages(pixels, offsets, widths, heights[:1])
