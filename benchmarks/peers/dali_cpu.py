"""DALI on the CPU with its own operators, fed with the stored bytes in place.

What is fastest in DALI is what it does here. Each image is decoded once and cropped twice (a partial decode for each
view, `decoders.image_random_crop`, was a tenth slower). Jitter and gray are one `color_twist`, with saturation 0 for
gray. Only the views that are blurred go through `gaussian_blur`, whose window follows each sample's σ. The last
operator flips, scales and transposes at once.

Its colours differ from the other contestants': `color_twist` has one order, clips once at its end, shifts the hue by a
linear map, and takes the contrast about mid-gray.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.two_views import Augment, Batches
from pipelines.beton import MODE_RAW, Beton, open_beton


class StoredBytes:
    """Batches of samples' bytes in the order of the file, again and again; as many as are allowed."""

    def __init__(self, beton: Beton, batch_size: int) -> None:
        self._samples = [_stored(beton, i) for i in range(beton.num_samples)]
        self._batch_size, self._next = batch_size, 0
        self.num_allowed = 0

    def __call__(self) -> list[NDArray[np.uint8]]:
        """The next batch."""
        if not self.num_allowed:
            raise StopIteration
        self.num_allowed -= 1
        first, self._next = self._next, self._next + self._batch_size
        return [self._samples[i % len(self._samples)] for i in range(first, self._next)]


def dali_cpu(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """uint8 crops in channels_last memory, or float32 views."""
    from nvidia.dali import pipeline_def  # takes a second to import

    beton = open_beton(path)
    source = StoredBytes(beton, batch_size)
    is_raw = bool(beton.modes[0] == MODE_RAW)
    options = {"batch_size": batch_size, "num_threads": workers, "device_id": None, "seed": 0}
    define = pipeline_def(two_views, enable_conditionals=True, **options)
    pipeline = define(source, is_raw, augment)
    pipeline.build()

    def batches(num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        source.num_allowed = num_images // batch_size
        for _ in range(source.num_allowed):
            first, second = (from_dlpack(views.as_tensor()) for views in pipeline.run())
            yield (first, second) if augment.color_strength else (first.movedim(3, 1), second.movedim(3, 1))
        pipeline.reset()

    return batches


def two_views(source: StoredBytes, is_raw: bool, augment: Augment) -> tuple[Any, Any]:
    """The pipeline's graph."""
    from nvidia.dali import fn, types

    options = {"batch": True, "no_copy": True, "dtype": types.UINT8}
    if is_raw:
        image = fn.external_source(source, ndim=3, layout="HWC", **options)
    else:
        image = fn.decoders.image(fn.external_source(source, ndim=1, **options))
    return _view(image, augment), _view(image, augment)


def _view(image: Any, augment: Augment) -> Any:
    from nvidia.dali import fn, types

    view = fn.random_resized_crop(
        image,
        size=augment.size,
        random_area=augment.crop_area,
        random_aspect_ratio=augment.crop_aspect,
        antialias=True,
    )
    flip = fn.random.coin_flip()
    if not augment.color_strength:
        return fn.flip(view, horizontal=flip)
    view = _colors(view, augment)
    if augment.blur:
        view = _blur_some(view, augment)
    return fn.crop_mirror_normalize(view, mirror=flip, mean=[0.0], std=[255.0], dtype=types.FLOAT, output_layout="CHW")


def _colors(view: Any, augment: Augment) -> Any:
    """Jitter some views and make some gray, in one step."""
    from nvidia.dali import fn

    jittered = fn.random.coin_flip(probability=augment.jitter_prob)
    colored = 1 - fn.random.coin_flip(probability=augment.gray_prob)
    brightness, contrast, saturation, hue = (jittered * fn.random.uniform(range=(-s, s)) for s in augment.jitter)
    return fn.color_twist(
        view,
        brightness=1 + brightness,
        contrast=1 + contrast,
        saturation=(1 + saturation) * colored,
        hue=360 * hue,
    )


def _blur_some(view: Any, augment: Augment) -> Any:
    """DALI makes of the condition a split of the batch, and merges both parts again."""
    from nvidia.dali import fn, types

    if fn.random.coin_flip(probability=augment.blur_prob, dtype=types.BOOL):
        blurred = fn.gaussian_blur(view, sigma=fn.random.uniform(range=augment.blur_sigma))
    else:
        blurred = view
    return blurred


def _stored(beton: Beton, i: int) -> NDArray[np.uint8]:
    encoded = beton.encoded(i)
    if beton.modes[i] != MODE_RAW:
        return encoded
    return encoded.reshape(beton.heights[i], beton.widths[i], 3)
