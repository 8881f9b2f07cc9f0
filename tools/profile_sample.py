"""A sample of the user's images in files of their own, stored as they are, and stored otherwise.

Advice about the encoding is tried on them.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.beton import MODE_RAW, Beton
from pipelines.build import Data, ImageFolder, Subset, whole_of
from pipelines.folder_dataset import list_images
from pipelines.subset import SubsetConfig
from tools.beton_writer import BetonWriter
from tools.image_decoding import UnusableImage, codec_settings, read_file
from tools.image_encoding import EncodedImage, EncodeOptions, encode_image
from tools.ordered_pool import ordered_pool
from tools.profile_rig import changed
from train.config import PretrainConfig
from train.labels import labels_of

MAX_IMAGES = 256  # different ones: their mean decoding time is some 5 % off
MAX_ROWS = 2048  # of a file, of which each image has several
MAX_BYTES = 2 * 2**30  # of a file


def write_sample(
    data: Data, path: Path, options: EncodeOptions | None, *, num_rows: int, workers: int, seed: int = 0
) -> None:
    """Write some of a set's images into a `.beton`, several times where it needs more rows than there are.

    Args:
        data: the set.
        path: the file.
        options: how they are stored; None: the bytes that the set stores.
        num_rows: of the file; see `rows_for`.
        workers: threads that encode.
        seed: of the choice.

    Raises:
        ValueError: the file would become too large, or no image can be used.
        OSError: it cannot be written.
    """
    rows = _choose(data, seed)
    labels, whole = labels_of(data), whole_of(data)
    files = [Path(file) for file, _ in list_images(whole.root)] if isinstance(whole, ImageFolder) else []

    def encode(position: int) -> EncodedImage | None:
        row = int(data.rows[position]) if isinstance(data, Subset) else position
        try:
            if not isinstance(whole, ImageFolder):
                return _stored(whole, row) if options is None else encode_image(_file_of(whole, row), options)
            return encode_image(read_file(files[row]), options or EncodeOptions())
        except UnusableImage:
            return None

    with codec_settings(), ordered_pool(workers) as ordered_map:
        found = [(row, image) for row, image in ordered_map(encode, rows.tolist()) if image is not None]
    if not found:
        raise ValueError(f"none of {len(rows)} images could be stored otherwise")
    if (total := num_rows * sum(len(image.data) for _, image in found) // len(found)) > MAX_BYTES:
        raise ValueError(f"a sample of {num_rows} images would take {total / 2**30:.1f} GiB; use a smaller batch")
    with path.open("x+b") as file:
        writer = BetonWriter(file, capacity=num_rows, labelled=labels is not None)
        for i in range(num_rows):
            row, image = found[i % len(found)]
            writer.add(image, None if labels is None else int(labels[row]))
        writer.finish()


def rows_for(config: PretrainConfig) -> int:
    """Rows that a sample needs: some batches to an epoch, so that its turn is no large part of it."""
    batch = config.data.global_batch_size
    return max(2 * batch, min(8 * batch, MAX_ROWS))


def on_sample(config: PretrainConfig, path: Path) -> PretrainConfig:
    """The same run on a sample's file."""
    loader = "ffcv" if config.data.loader == "folder" else config.data.loader
    moved = changed(config, {"data.path": str(path), "data.loader": loader})
    return replace(moved, data=replace(moved.data, subset=SubsetConfig(), labelled=SubsetConfig()))


def encode_options(change: dict[str, Any]) -> EncodeOptions:
    """Of advice such as `{"convert.max_side": 256}`; the rest as `tools.convert` has it."""
    return EncodeOptions(
        **{name.removeprefix("convert."): value for name, value in change.items() if name.startswith("convert.")}
    )


def _choose(data: Data, seed: int) -> NDArray[np.int64]:
    """Positions among the images that are used, rising."""
    num = data.num_samples
    return np.sort(np.random.default_rng(seed).choice(num, min(num, MAX_IMAGES), replace=False))


def _stored(beton: Beton, row: int) -> EncodedImage:
    data = beton.encoded(row).tobytes()
    width, height, mode = int(beton.widths[row]), int(beton.heights[row]), int(beton.modes[row])
    return EncodedImage(mode=mode, width=width, height=height, data=data, crc32=zlib.crc32(data), kept=True)


def _file_of(beton: Beton, row: int) -> bytes:
    """An image file with the stored pixels."""
    stored = beton.encoded(row)
    if beton.modes[row] != MODE_RAW:
        return stored.tobytes()
    pixels = stored.reshape(int(beton.heights[row]), int(beton.widths[row]), 3)
    done, png = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    if not done:
        raise UnusableImage("cannot be encoded as PNG")
    return png.tobytes()
