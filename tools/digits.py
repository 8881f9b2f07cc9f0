"""The demo's images: scikit-learn's handwritten digits, as a folder of PNGs that needs no download.

1,797 digits of 8×8 pixels (UCI, "Optical Recognition of Handwritten Digits", test set), enlarged to 32×32.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 32
NUM_TEST = 450
SPLIT_SEED = 0
MAX_LEVEL = 16  # of the set's pixels


def write_digits(folder: Path) -> None:
    """Write `folder/train/DIGIT/NNNN.png` and `folder/test/…`, the same split every time, classes in proportion."""
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_TEST, stratify=digits.target, random_state=SPLIT_SEED
    )
    for split, rows in (("train", train), ("test", test)):
        for row in rows.tolist():
            path = folder / split / str(digits.target[row]) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            levels = (digits.images[row] * (255 / MAX_LEVEL)).astype(np.uint8)
            Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
