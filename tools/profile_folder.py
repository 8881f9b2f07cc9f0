"""What an image of a plain folder takes in the processes of the folder loader: their functions, in this process.

A process decodes and cuts one image after the other on one thread; n of them do so n times as fast. What counts is the
time of the thread on its core: what else the machine does in this process's time, it would not do n times.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pipelines.draw import draw_views
from pipelines.folder_dataset import crop_image, decode_image
from pipelines.folder_loader import FolderLoader

GROUP = 16  # images that are timed together: one alone tells more of its size


def folder_times(loader: FolderLoader, num_processes: int, seconds: float) -> dict[str, tuple[list[float], str]]:
    """Seconds for a batch of this rank, several times, and how they were found, of `decode` and `crop`.

    Args:
        loader: whose images, in the run's order; those that cannot be decoded are left out.
        num_processes: that share a batch.
        seconds: that this may take.

    Raises:
        ValueError: the first images cannot be decoded.
    """
    rows = np.concatenate([loader.plan.samples(0, batch) for batch in range(min(len(loader), 64))])
    threads, found, reason = torch.get_num_threads(), [], ""
    torch.set_num_threads(1)
    try:
        began = 0.0
        for row in rows.tolist():
            try:
                if not began:  # what is made once
                    _one_image(loader, row)
                    began = time.perf_counter()
                found.append(_one_image(loader, row))
            except ValueError as error:
                reason = str(error)
            if began and len(found) >= GROUP and time.perf_counter() - began > seconds:
                break
    finally:
        torch.set_num_threads(threads)
    if not found:
        raise ValueError(f"`data.path` must hold images that can be decoded, got none: {reason}")
    local_batch_size = loader.plan.global_batch_size // loader.plan.world_size
    groups = [np.mean(found[i : i + GROUP], 0) for i in range(0, len(found), GROUP)]
    of_batch = np.array(groups) * local_batch_size / num_processes
    how = f"CPU time of one process, times {num_processes}"
    return {
        "decode": (of_batch[:, 0].tolist(), f"Pillow, reading the file as well; {how}"),
        "crop": (of_batch[:, 1].tolist(), f"drawing, and every view cut and resized by torchvision; {how}"),
    }


def _one_image(loader: FolderLoader, row: int) -> tuple[float, float]:
    """CPU seconds of decoding one image, and of cutting its views."""
    began = time.thread_time()
    image = decode_image(loader.dataset.files[row])
    decoded = time.thread_time()
    height, width = image.shape[-2:]
    size = np.array([width], np.int32), np.array([height], np.int32)
    params = draw_views(loader.recipe, loader.seed, 0, np.array([row]), *size)
    for drawn, view in zip(params[0], loader.recipe.views, strict=True):
        crop_image(image, drawn, view.size, view.interpolation)
    return decoded - began, time.thread_time() - decoded
