"""Stock FFCV: one loader with two pipelines over the image field, each of which decodes, crops and flips.

Its operations are FFCV's own; it has neither a hue nor a blur, so it takes no part where these are asked for.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestant import Run


def stock_ffcv(path: Path, size: int, batch_size: int, workers: int) -> Run:
    """Two views, float32 in [0, 1], channels_last."""
    os.environ["NUMBA_NUM_THREADS"] = str(workers)  # read by its import; FFCV refuses more workers than that
    # Importing it takes seconds, and only this process may compile its kernels: compiled after other Numba kernels,
    # they fail in FFCV's thread, which then hangs its consumer.
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    torch.set_num_threads(1)
    threading.excepthook = _end_process

    def view() -> PipelineSpec:
        to_unit_range = NormalizeImage(np.zeros(3), np.full(3, 255.0), np.float32)
        return PipelineSpec(
            "image",
            decoder=RandomResizedCropRGBImageDecoder((size, size)),
            transforms=[RandomHorizontalFlip(), to_unit_range, ToTensor(), ToTorchImage()],
        )

    loader = Loader(
        str(path),
        batch_size=batch_size,
        num_workers=workers,
        order=OrderOption.SEQUENTIAL,
        os_cache=True,
        pipelines={"image": view(), "second_image": view(), "label": None},
    )
    rows = np.arange(int(loader.reader.num_samples))

    def run(num_images: int) -> None:
        # An epoch cannot be left early without leaking a thread, so it is made as long as the turn.
        order = np.resize(rows, num_images)
        loader.traversal_order.indices = loader.first_traversal_order = order
        deque(loader, maxlen=0)

    run(batch_size)  # compiles
    return run


def _end_process(args: threading.ExceptHookArgs) -> None:
    """An exception in FFCV's thread would leave its consumer waiting for ever."""
    sys.__excepthook__(args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback)
    os._exit(1)
