"""DALI's operators with our parameters: its resizing against torchvision, its colours against the reference chain."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipelines.dali_pipeline import ViewPipeline, view_inputs
from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION, VIEW_PARAMS
from pipelines.photometric import reference
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.betons import natural_image


def crop_by_dali(image, windows, view):
    """Windows (top, left, height, width) of one image, [N, 3, S, S] in levels."""
    params = np.zeros(len(windows), VIEW_PARAMS)
    for name, values in zip(("top", "left", "height", "width"), zip(*windows, strict=True), strict=True):
        params[name] = values
    return run_by_dali([image] * len(windows), params, view, "ours").double()


def run_by_dali(images, params, view, photometric):
    pipeline = ViewPipeline(
        Recipe(views=(view,)),
        raw=True,
        batch_size=len(images),
        num_threads=2,
        device=torch.device("cpu"),
        queue_depth=2,
        photometric=photometric,
    )
    pipeline.begin(iter([[images, *view_inputs(params, view, photometric).values()]]))
    return pipeline.run()[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_nothing_outside_a_window_bleeds_in(interpolation):
    image = np.full((40, 50, 3), 255, np.uint8)
    windows = [(10, 20, 15, 11), (30, 5, 1, 1), (0, 0, 40, 3)]
    for top, left, height, width in windows:
        image[top : top + height, left : left + width] = 7
    assert (crop_by_dali(image, windows, ViewRecipe(size=24, interpolation=interpolation)) == 7).all()


@pytest.mark.parametrize(("interpolation", "mean", "highest"), [("bilinear", 0.3, 3.0), ("bicubic", 0.3, 2.5)])
def test_resizing_is_torchvisions_antialiased_filter_but_for_the_edges(interpolation, mean, highest):
    # Measured: means 0.25, highest 2.4 and 1.6 at the edges; inside, rounding alone (the cubic is Keys' with a = −1/2).
    image = np.array(natural_image(300, 200, 0))
    windows = [(10, 20, 150, 200), (0, 0, 200, 300), (50, 60, 30, 40), (5, 5, 190, 12), (33, 47, 97, 101)]
    ours = crop_by_dali(image, windows, ViewRecipe(size=64, interpolation=interpolation))
    source, mode = torch.from_numpy(image).permute(2, 0, 1).double(), InterpolationMode(interpolation)
    theirs = torch.stack([F.resized_crop(source, *w, [64, 64], mode, antialias=True) for w in windows]).clamp(0, 255)
    difference = (ours - theirs).abs()
    assert difference.mean() < mean
    assert difference.max() < highest
    assert difference[:, :, 12:-12, 12:-12].max() < 0.55


SIDE = 64
NUM = 12


def neutral():
    params = np.zeros(NUM, VIEW_PARAMS)
    params["height"] = params["width"] = SIDE
    params["jitter_order"], params["jitter_factor"][:, :HUE] = NO_OP, 1.0
    params["solarize_threshold"] = np.inf
    return params


def jittered(op, low, high):
    params = neutral()
    params["jitter_order"][:, 2] = op
    params["jitter_factor"][:, op] = np.linspace(low, high, NUM)
    return params


def colors(params, **changes):
    """DALI's colours and the float64 reference's on the same images, levels of 255, and the images themselves."""
    view = ViewRecipe(size=SIDE, **changes)
    images = [np.array(natural_image(SIDE, SIDE, i)) for i in range(NUM)]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    theirs = reference.photometric(batch, params, view, Recipe(views=(view,)), torch.float64)
    return 255 * run_by_dali(images, params, view, "dali").double(), 255 * theirs, batch.double()


JITTER = {"jitter_prob": 1.0, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


@pytest.mark.parametrize(
    ("params", "changes", "highest"),
    [
        (neutral(), {**JITTER, "gray_prob": 0.1, "blur_prob": 0.5, "solarize_prob": 0.2}, 1e-4),
        (jittered(BRIGHTNESS, 0.2, 1.8), JITTER, 0.51),
        (jittered(SATURATION, 0.2, 1.8), JITTER, 1.2),  # its luma weights are rounded to 3 digits
        ("gray", {"gray_prob": 1.0}, 1.2),
        ("blur_sigma", {"blur_prob": 1.0}, 0.8),  # its window ends at 3σ
        ("solarize_threshold", {"solarize_prob": 1.0}, 1e-4),
    ],
    ids=["none", "brightness", "saturation", "gray", "blur", "solarize"],
)
def test_dalis_colors_are_ours_where_the_arithmetic_is(params, changes, highest):
    if isinstance(params, str):
        name, params = params, neutral()
        params[name][3:] = {"gray": 1, "blur_sigma": 2.0, "solarize_threshold": 0.5}[name]  # and three without
    ours, theirs, _ = colors(params, **changes)
    assert (ours - theirs).abs().max() < highest


def test_dalis_contrast_is_about_the_middle_of_the_scale():
    params = jittered(CONTRAST, 0.2, 1.8)
    ours, theirs, images = colors(params, **JITTER)
    factor = torch.from_numpy(params["jitter_factor"][:, CONTRAST]).double()[:, None, None, None]
    assert (ours - (factor * (images - 128) + 128).clamp(0, 255)).abs().max() < 0.51
    assert (ours - theirs).abs().max() > 2


def test_dalis_hue_is_a_turn_of_the_chroma_plane():
    # The YIQ rotation of color_twist: it keeps the luma, where ours keeps the value, and turns the same way.
    params = jittered(HUE, -0.2, 0.2)
    ours, theirs, images = colors(params, **JITTER)
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    angle = 2 * np.pi * params["jitter_factor"][:, HUE].astype(np.float64)
    turn = np.zeros((NUM, 3, 3))
    turn[:, 0, 0], turn[:, 1, 1], turn[:, 2, 2] = 1, np.cos(angle), np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = np.sin(angle), -np.sin(angle)
    matrices = torch.from_numpy(np.linalg.inv(to_yiq) @ turn @ to_yiq)
    expected = torch.einsum("nij,njhw->nihw", matrices, images).clamp(0, 255)
    assert (ours - expected).abs().max() < 1.5
    assert (ours - theirs).abs().mean() < 25  # measured: 18
