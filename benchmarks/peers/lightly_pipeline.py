"""lightly's own SimCLRTransform with torch's DataLoader, as lightly's examples use it.

Its blur is Pillow's, a few box filters in a row. Normalisation is left out, since no contestant does it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from benchmarks.peers.stored_images import data_loader
from benchmarks.two_views import Augment, Batches


def lightly(path: Path, augment: Augment, batch_size: int, workers: int) -> Batches:
    """The whole recipe on PIL images; lightly has no transform that only crops and flips."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # v2's ToTensor, which it uses, is deprecated
        from lightly.transforms import SimCLRTransform  # seconds to import, and an optional package

        make_two_views = SimCLRTransform(
            input_size=augment.size,
            cj_prob=augment.jitter_prob,
            cj_strength=augment.color_strength,
            min_scale=augment.crop_area[0],
            random_gray_scale=augment.gray_prob,
            gaussian_blur=augment.blur_prob if augment.blur else 0.0,
            sigmas=augment.blur_sigma,
            normalize=None,
        )
    return data_loader(path, "pil", make_two_views, batch_size, workers)
