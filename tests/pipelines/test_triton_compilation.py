"""The GPU kernels compile for an A100 and an H100, with nothing spilled and shared memory that the chips have."""

import numpy as np
import pytest
import torch

from pipelines.draw import draw_views
from pipelines.geometry.crop_resize_triton import crop_launch
from pipelines.params import VIEW_PARAMS
from pipelines.photometric.triton_launch import launches
from pipelines.recipe import Recipe, ViewRecipe
from tests.native.triton_compilation import SHARED_MEMORY, compile_launch
from tests.pipelines.triton_inputs import COLOURS, EVERYTHING

RECIPES = {
    "simclr": ViewRecipe(size=224, **COLOURS, blur_prob=0.5),
    "byol": ViewRecipe(size=224, **COLOURS, blur_prob=0.1, solarize_prob=0.2),
    "cifar": ViewRecipe(size=32, **COLOURS),
    "dino": ViewRecipe(size=96, **COLOURS, blur_prob=0.5),
    "odd": ViewRecipe(size=41, **COLOURS, blur_prob=0.5),
    "wide": ViewRecipe(size=224, **COLOURS, blur_prob=0.5, blur_sigma=(0.1, 3.0)),
    "everything": ViewRecipe(size=224, **EVERYTHING),
}
QUICK = [
    ("simclr", torch.bfloat16),
    ("simclr", torch.float32),
    ("cifar", torch.bfloat16),
    ("dino", torch.bfloat16),
    ("wide", torch.float16),
]
THOROUGH = [(name, dtype) for name in RECIPES for dtype in (torch.bfloat16, torch.float16, torch.float32)]


def photometric_launches(view, dtype):
    """Each kernel that the view needs, once."""
    num, extent = 64, np.full(64, 300, np.int32)
    recipe = Recipe(views=(view,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    params = draw_views(recipe, 0, 0, np.arange(num), extent, extent)[:, 0]
    crops = torch.empty((num, 3, view.size, view.size), dtype=torch.uint8, memory_format=torch.channels_last)
    out = torch.empty_like(crops, dtype=dtype)
    every = {(run.kernel, run.constants.get("FINISH")): run for run in launches(crops, params, view, recipe, out)}
    return list(every.values())


def check(launch, capability):
    compiled = compile_launch(launch, capability)
    print(f"{compiled.name:20} sm_{capability} {compiled.registers:4} registers {compiled.shared_bytes:6} B shared")
    assert compiled.local_bytes == 0, f"{compiled.name} spills on sm_{capability}: {launch.constants}"
    assert compiled.shared_bytes <= SHARED_MEMORY[capability]
    return compiled


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype"), QUICK)
def test_the_photometric_chain(name, dtype, capability):
    every = [check(launch, capability) for launch in photometric_launches(RECIPES[name], dtype)]
    blurs = {
        "cifar": [],
        "simclr": ["blur_axis_kernel"] * 2 if dtype == torch.float32 else ["blur_kernel", "blur_weights_kernel"],
        "dino": ["blur_kernel", "blur_weights_kernel"],
        "wide": ["blur_axis_kernel"] * 2,
    }[name]
    points = ["points_kernel"] * (2 if blurs else 1)
    assert sorted(compiled.name for compiled in every) == [*blurs, "luma_sums_kernel", *points]
    for compiled in every:
        assert "ld.global.b8" not in compiled.ptx  # four bytes of pixels at a time
        assert ("mma.sync" in compiled.ptx) == (compiled.name == "blur_kernel")  # on tensor cores


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype"), THOROUGH)
def test_the_photometric_chain_of_every_recipe(name, dtype, capability):
    for launch in photometric_launches(RECIPES[name], dtype):
        check(launch, capability)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 41, 224])
def test_crop_and_resize(size, interpolation, capability):
    pixels, offsets, widths = (torch.zeros(64, dtype=dtype) for dtype in (torch.uint8, torch.int64, torch.int32))
    out = torch.empty((64, 3, size, size), dtype=torch.uint8)
    view = ViewRecipe(size=size, interpolation=interpolation)
    check(crop_launch(pixels, offsets, widths, np.zeros(64, VIEW_PARAMS), view, out), capability)
