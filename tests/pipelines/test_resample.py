"""Crop and resize against torchvision, and decoding against Pillow."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pipelines.decode.kernel import BAD_HEADER, OK, REFUSED, WRONG_SIZE, decode
from pipelines.decode.resample import resized_crop
from pipelines.decode.turbojpeg import addresses
from pipelines.pool import Worker
from tests.pipelines.betons import natural_image, needs_data

MODE_JPEG, MODE_RAW = 0, 1


def crop(image, window, size, *, flip=False):
    """Our resized crop of an RGB image, uint8 [S, S, 3]."""
    top, left, height, width = window
    rgbx = np.dstack([image, np.zeros_like(image[..., :1])])
    scratch = Worker([size]).scratch(image.shape[0] * image.shape[1], max(image.shape[:2]))
    out = np.empty((size, size, 3), np.uint8)
    resized_crop(
        rgbx, top, left, height, width, flip, out, scratch.row, scratch.firsts, scratch.counts, scratch.weights
    )
    return out


def torchvision_crop(image, window, size):
    """torchvision's antialiased crop in float64, uint8-valued [S, S, 3]."""
    x = torch.from_numpy(image).permute(2, 0, 1).double()
    return F.resized_crop(x, *window, [size, size], antialias=True).permute(1, 2, 0).numpy()


def decode_bytes(data, width, height, mode=MODE_JPEG):
    worker = Worker([8])
    scratch = worker.scratch(width * height, max(width, height))
    status, image = decode(
        np.frombuffer(data, np.uint8), mode, width, height, addresses(), worker.decompressor.handle, scratch
    )
    return status, image[..., :3].copy(), worker.decompressor.last_error()


@pytest.mark.parametrize("size", [1, 7, 32, 96, 224])
@pytest.mark.parametrize(
    "window",
    [
        (0, 0, 375, 500),
        (10, 20, 224, 224),
        (300, 400, 75, 100),
        (5, 5, 3, 2),
        (374, 499, 1, 1),
        (0, 250, 375, 1),
    ],
)
def test_a_crop_is_torchvisions_rounded_once(window, size):
    image = np.array(natural_image(500, 375, seed=1))
    expected = torchvision_crop(image, window, size)
    ours = crop(image, window, size)
    # Half a level from the rounding, and what float32 weights can add.
    assert np.abs(ours - expected).max() < 0.502


def test_a_flip_mirrors_the_crop():
    image = np.array(natural_image(120, 90, seed=2))
    window = (8, 4, 70, 101)
    assert (crop(image, window, 32, flip=True) == crop(image, window, 32)[:, ::-1]).all()


def test_nothing_outside_the_window_bleeds_in():
    image = np.zeros((60, 60, 3), np.uint8)
    image[20:40, 20:40] = 200
    assert (crop(image, (20, 20, 20, 20), 7) == 200).all()


def test_a_window_of_the_outputs_size_is_copied():
    image = np.array(natural_image(50, 40, seed=3))
    assert (crop(image, (3, 5, 32, 32), 32) == image[3:35, 5:37]).all()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_decoded_as_by_pillow(mode, subsampling):
    # Odd sizes, since chroma subsampling has to invent the last column and row.
    file = io.BytesIO()
    natural_image(101, 67, seed=4).convert(mode).save(file, "JPEG", quality=90, subsampling=subsampling)
    expected = np.array(Image.open(file).convert("RGB"))
    status, ours, _ = decode_bytes(file.getvalue(), 101, 67)
    assert status == OK
    assert (ours == expected).all()


@needs_data
def test_real_photographs_are_decoded_as_by_pillow():
    with tarfile.open(Path(os.environ["TWINVIEW_DATA"], "imagenet-sample.tar")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".JPEG"))[::11]
        photographs = [tar.extractfile(name).read() for name in names]
    assert len(photographs) > 20
    for data in photographs:
        with Image.open(io.BytesIO(data)) as image:
            expected = np.array(image.convert("RGB"))
        height, width = expected.shape[:2]
        status, ours, _ = decode_bytes(data, width, height)
        assert status == OK
        assert (ours == expected).all()
        window = (height // 5, width // 7, height // 2, width // 2)
        assert np.abs(crop(ours, window, 224) - torchvision_crop(expected, window, 224)).max() < 0.502


def test_raw_pixels_are_copied():
    image = np.array(natural_image(13, 9, seed=5))
    status, ours, _ = decode_bytes(image.tobytes(), 13, 9, MODE_RAW)
    assert status == OK
    assert (ours == image).all()


def test_damaged_jpegs_are_refused_with_libjpegs_reason():
    file = io.BytesIO()
    natural_image(64, 64, seed=6).save(file, "JPEG")
    data = file.getvalue()
    status, _, reason = decode_bytes(data[: len(data) // 2], 64, 64)
    assert status == REFUSED
    assert "Premature end of JPEG file" in reason
    status, _, reason = decode_bytes(b"no image at all", 64, 64)
    assert status == BAD_HEADER
    assert "Not a JPEG file" in reason
    assert decode_bytes(data, 64, 63)[0] == WRONG_SIZE
