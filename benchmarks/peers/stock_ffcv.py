"""Stock FFCV: one loader with two pipelines over the image field, each of which decodes, crops and flips.

Its operations are FFCV's own; it has neither a hue nor a blur, so it takes no part where these are asked for.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.two_views import Augment, Batches


def stock_ffcv(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """uint8 crops in channels_last memory; two pipelines are its only way to a second view."""
    os.environ["NUMBA_NUM_THREADS"] = str(workers)  # read by its import; FFCV refuses more workers than that
    # Importing it takes seconds, and only this process may compile its kernels: compiled after other Numba kernels,
    # they fail in FFCV's thread, which then hangs its consumer.
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    torch.set_num_threads(1)
    threading.excepthook = _end_process

    def view() -> PipelineSpec:
        decoder = RandomResizedCropRGBImageDecoder((augment.size,) * 2, augment.crop_area, augment.crop_aspect)
        return PipelineSpec("image", decoder=decoder, transforms=[RandomHorizontalFlip(), ToTensor(), ToTorchImage()])

    loader = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={"image": view(), "second_image": view(), "label": None},
    )
    rows = np.arange(int(loader.reader.num_samples))

    def batches(num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        # An epoch cannot be left early without leaking a thread, so it is made as long as the turn.
        order = np.resize(rows, num_images)
        loader.traversal_order.indices = loader.first_traversal_order = order
        yield from ((first, second) for first, second, *_ in loader)

    list(batches(batch_size))  # compiles
    return batches


def _end_process(args: threading.ExceptHookArgs) -> None:
    """An exception in FFCV's thread would leave its consumer waiting for ever."""
    sys.__excepthook__(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    os._exit(1)
