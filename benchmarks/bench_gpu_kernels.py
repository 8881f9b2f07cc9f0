"""The GPU's photometric chain and crop-and-resize against the memory-bandwidth floor, on the current CUDA device.

`copy` moves the bytes that the work cannot do without, each read once or written once, as fast as torch's copy kernel
can; what `twinview` reaches of its rate is the share of the floor. `twinview` and `copy` are CUDA graphs of the kernels
alone; `twinview_entry` is what a loader calls, which packs the parameters and starts the kernels each time.
`reference` is the same work in plain torch operations. An item is one view of one image.

Without a CUDA device the works are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.conftest import Bench
from benchmarks.contestant import Contestant, Run
from benchmarks.harness import Floor
from pipelines.draw import draw_views
from pipelines.geometry import crop_resize as geometry
from pipelines.geometry.crop_resize import PackedImages, crop_resize
from pipelines.params import ViewParams
from pipelines.photometric import chain
from pipelines.photometric.chain import photometric_chain
from pipelines.recipe import Recipe, ViewRecipe

PIXELS = 512 * 224**2  # of the views of a batch
DISTINCT_BATCHES = 4  # together more bytes than a GPU's cache holds
COLOURS: dict[str, Any] = {
    "jitter_prob": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "gray_prob": 0.2,
}
RECIPES = {
    "photo224": (ViewRecipe(size=224, **COLOURS), torch.bfloat16),
    "photo_blur224": (ViewRecipe(size=224, **COLOURS, blur_prob=0.5), torch.bfloat16),
    "photo_blur224_fp32": (ViewRecipe(size=224, **COLOURS, blur_prob=0.5), torch.float32),
    "photo_blur96": (ViewRecipe(size=96, **COLOURS, blur_prob=0.5), torch.bfloat16),
    "photo32": (ViewRecipe(size=32, **COLOURS), torch.bfloat16),
}
CROPS = {"crop224": (224, 500, 375), "crop32": (32, 32, 32)}  # side of the view, size of the images

# What the chain can reach of the copy's rate is set by its instructions. An H100 runs 132 · 128 · 1.75e9 of a
# thread's instructions in a second. In the time that a copy takes for a bfloat16 pixel, 9 bytes at 2.9e12 B/s, that
# is 92 of them, and 153 for a float32 pixel of 15 bytes. Counted in what Triton 3.9 compiles for sm_90, and weighted
# by how often a step is drawn, a pixel takes 29 for the luma before its contrast, and 77 from there to the finished
# view. Where it is blurred it takes instead 66 to the planes, 10 for the weights and 67 for the blur in 16 bits; 63
# and 299 in float32. Unblurred that is 106, which would be 0.87 of the copy's rate; with half of them blurred 139,
# hence 0.66, and in float32 249, hence 0.62. Kernels that are well fed fill about 0.8 of the slots, which gives the
# goals, and two thirds of a goal are asserted.
GOALS = {"photo224": 0.7, "photo_blur224": 0.55, "photo_blur224_fp32": 0.5, "photo_blur96": 0.55, "photo32": 0.7}
CROP_FLOORS = {"reference": Floor(speed=5.0, goal=20.0)}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("work", RECIPES)
def test_photometric(work: str, bench: Bench) -> None:
    floors = {"copy": Floor(speed=GOALS[work] * 2 / 3, goal=GOALS[work]), "reference": Floor(speed=5.0, goal=20.0)}
    _race(work, RECIPES[work][0].size, photometric_batches, floors, bench)


@pytest.mark.parametrize("work", CROPS)
def test_crop_resize(work: str, bench: Bench) -> None:
    _race(work, CROPS[work][0], crop_batches, CROP_FLOORS, bench)


def _race(work: str, size: int, setup: Callable[..., Run], floors: dict[str, Floor], bench: Bench) -> None:
    names = ("twinview", "twinview_entry", "copy", "reference")
    step = _batch_size(size)
    contestants = [Contestant(name=name, setup=setup, arguments=(work, name), step=step) for name in names]
    bench.race(f"gpu_{work}", "images/s", contestants, floors)


def photometric_batches(work: str, contestant: str) -> Run:
    """Contestants of the photometric chain."""
    view, dtype = RECIPES[work]
    recipe, num = Recipe(views=(view,)), _batch_size(view.size)
    if contestant == "copy":
        return _copies(num, num * 3 * view.size**2 * (1 + dtype.itemsize))
    params = _params(recipe, np.full(num, 500, np.int32), np.full(num, 375, np.int32))
    shape = (DISTINCT_BATCHES, num, 3, view.size, view.size)
    crops = [
        batch.contiguous(memory_format=torch.channels_last)
        for batch in torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    ]
    if contestant == "twinview":
        from pipelines.photometric.triton_launch import launches

        out = torch.empty_like(crops[0], dtype=dtype)
        prepared = [list(launches(crops[i], params[i], view, recipe, out)) for i in range(DISTINCT_BATCHES)]
        return _graphs(num, lambda i: [launch.run() for launch in prepared[i]])
    backend: chain.Backend = "triton" if contestant == "twinview_entry" else "reference"
    return _batches(num, lambda i: photometric_chain(crops[i], params[i], view, recipe, dtype, backend))


def crop_batches(work: str, contestant: str) -> Run:
    """Contestants of crop and resize; those that read no images read the windows alone."""
    size, width, height = CROPS[work]
    view, num = ViewRecipe(size=size, flip_prob=0.5), _batch_size(size)
    widths, heights = np.full(num, width, np.int32), np.full(num, height, np.int32)
    params = _params(Recipe(views=(view,)), widths, heights)
    if contestant == "copy":
        windows = sum(float((p["width"] * p["height"]).sum()) for p in params) / DISTINCT_BATCHES
        return _copies(num, int(3 * (windows + num * size**2)))
    images = [
        PackedImages(
            torch.randint(0, 256, (num * width * height * 3,), dtype=torch.uint8, device="cuda"),
            torch.arange(num, device="cuda") * (width * height * 3),
            torch.from_numpy(widths).cuda(),
            torch.from_numpy(heights).cuda(),
        )
        for _ in range(DISTINCT_BATCHES)
    ]
    if contestant == "twinview":
        from pipelines.geometry.crop_resize_triton import crop_launch

        out = torch.empty((num, 3, size, size), dtype=torch.uint8, device="cuda", memory_format=torch.channels_last)
        prepared = [
            crop_launch(packed.pixels, packed.offsets, packed.widths, p, view, out)
            for packed, p in zip(images, params, strict=True)
        ]
        return _graphs(num, lambda i: prepared[i].run())
    backend: geometry.Backend = "triton" if contestant == "twinview_entry" else "reference"
    return _batches(num, lambda i: crop_resize(images[i], params[i], view, backend))


def _batch_size(size: int) -> int:
    return PIXELS // size**2


def _params(recipe: Recipe, widths: NDArray[np.int32], heights: NDArray[np.int32]) -> list[ViewParams]:
    samples = np.arange(len(widths))
    return [draw_views(recipe, 0, epoch, samples, widths, heights)[:, 0] for epoch in range(DISTINCT_BATCHES)]


def _copies(num: int, num_bytes: int) -> Run:
    """Reads and writes `num_bytes` in all for each batch of `num` images: random ones, which cost the most power."""
    half = (num_bytes + 1) // 2
    source = torch.randint(0, 256, (DISTINCT_BATCHES, half), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return _graphs(num, lambda i: target[i].copy_(source[i]))


def _graphs(num: int, one: Callable[[int], object]) -> Run:
    """A CUDA graph of each distinct batch, so that starting the kernels costs next to nothing."""
    graphs = []
    for i in range(DISTINCT_BATCHES):
        one(i)  # compiles
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[i]):
            one(i)
    return _batches(num, lambda i: graphs[i].replay())


def _batches(num: int, one: Callable[[int], object]) -> Run:
    """Batches of `num` images one after the other, and the wait for the last one."""

    def run(num_items: int) -> None:
        for i in range(num_items // num):
            one(i % DISTINCT_BATCHES)
        torch.cuda.synchronize()

    run(num * DISTINCT_BATCHES)
    return run
