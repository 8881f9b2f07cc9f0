"""Crop and resize against torchvision, and decoding against Pillow."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from pipelines.decode.kernel import BAD_HEADER, OK, REFUSED, WRONG_SIZE, Source, decode
from pipelines.decode.resample import CUBIC, TRIANGLE, resized_crop, unpack
from pipelines.decode.turbojpeg import addresses
from pipelines.pool import Worker
from tests.pipelines.betons import natural_image, needs_data

MODE_JPEG, MODE_RAW = 0, 1


def crop(image, window, size, *, flip=False, kind=TRIANGLE):
    """Our resized crop of an RGB image, uint8 [S, S, 3]."""
    scratch = Worker([size], kind).scratch(image.shape[0] * image.shape[1], max(image.shape[:2]))
    rgbx = scratch.pixels[: image.shape[0] * image.shape[1] * 4].reshape(*image.shape[:2], 4)
    rgbx[..., :3] = image
    resized_crop(
        rgbx,
        kind,
        *window,
        flip,
        size,
        scratch.columns,
        scratch.packed,
        scratch.firsts,
        scratch.counts,
        scratch.weights,
    )
    out = np.empty((size, size, 3), np.uint8)
    unpack(scratch.packed, out.reshape(-1))
    return out


def torchvision_crop(image, window, size, kind=TRIANGLE):
    """torchvision's antialiased crop in float64, unrounded, clipped to [0, 255], [S, S, 3]."""
    x = torch.from_numpy(image).permute(2, 0, 1).double()
    mode = F.InterpolationMode.BICUBIC if kind == CUBIC else F.InterpolationMode.BILINEAR
    return F.resized_crop(x, *window, [size, size], mode, antialias=True).clamp(0, 255).permute(1, 2, 0).numpy()


def decode_bytes(data, width, height, mode=MODE_JPEG, reduction=1):
    worker = Worker([8])
    scratch = worker.scratch(width * height, max(width, height))
    tables = [np.array([value]) for value in (0, len(data), mode, width, height)]
    source = Source(np.frombuffer(data, np.uint8), *tables)
    status, image = decode(source, 0, reduction, 0, height, addresses(), worker.decompressor.handles, scratch)
    return status, image[..., :3].copy(), worker.decompressor.last_error()


@pytest.mark.parametrize("kind", [TRIANGLE, CUBIC])
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
def test_a_crop_is_torchvisions_rounded_once(window, size, kind):
    image = np.array(natural_image(500, 375, seed=1))
    image[100:200, 100:200] = 255 * (np.indices((100, 100)).sum(0) // 7 % 2)[..., None]  # edges that a cubic overshoots
    expected = torchvision_crop(image, window, size, kind)
    ours = crop(image, window, size, kind=kind)
    # Half a level from the rounding, and what float32 weights can add.
    assert np.abs(ours - expected).max() < 0.502


@pytest.mark.parametrize(("kind", "pillows"), [(TRIANGLE, Image.BILINEAR), (CUBIC, Image.BICUBIC)])
@pytest.mark.parametrize("window", [(10.5, 3.25, 60.25, 80.5), (0.0, 0.75, 99.5, 30.0)])
def test_a_window_may_begin_and_end_within_a_pixel(window, kind, pillows):
    # Pillow takes such windows too, and in its mode F rounds nothing. It lets the outside bleed in, at the border.
    image = np.array(natural_image(120, 100, seed=7))
    top, left, height, width = window
    box = (left, top, left + width, top + height)
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((32, 32), pillows, box) for c in range(3)]
    expected = np.dstack([np.asarray(channel) for channel in channels]).clip(0, 255)
    inner = slice(3, -3)
    assert np.abs(crop(image, window, 32, kind=kind) - expected)[inner, inner].max() < 0.502


def test_a_window_of_less_than_a_pixel_is_that_pixel():
    image = np.array(natural_image(120, 100, seed=7))
    assert (crop(image, (40.25, 70.75, 0.5, 0.25), 9) == image[40, 70]).all()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_memory_but_its_own_is_written(data):
    # The kernel works with bare addresses: every array it may write has sentinels behind it.
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    size, kind = data.draw(st.integers(1, 41)), data.draw(st.sampled_from([TRIANGLE, CUBIC]))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    window = (top, left, data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left)))
    plain = Worker([size], kind).scratch(height * width, max(height, width))
    guarded = {name: np.full(getattr(plain, name).size + 64, 77, getattr(plain, name).dtype) for name in plain._fields}
    inner = {name: array[:-64].reshape(getattr(plain, name).shape) for name, array in guarded.items()}
    rgbx = inner["pixels"][: height * width * 4].reshape(height, width, 4)
    rgbx[:] = np.random.default_rng(size).integers(0, 256, rgbx.shape)
    out = np.full(size * size * 3 + 64, 77, np.uint8)
    scratch = [inner[name] for name in ("columns", "packed", "firsts", "counts", "weights")]
    resized_crop(rgbx, kind, *window, False, size, *scratch)
    unpack(inner["packed"], out[:-64])
    assert (out[-64:] == 77).all()
    for name, array in guarded.items():
        assert (array[-64:] == 77).all(), name
    expected = torchvision_crop(rgbx[..., :3], window, size, kind)
    assert np.abs(out[:-64].reshape(size, size, 3) - expected).max() < 0.502


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


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("reduction", [2, 4])
def test_a_scaled_decode_is_pillows_draft(reduction, subsampling):
    file = io.BytesIO()
    natural_image(203, 150, seed=8).save(file, "JPEG", quality=90, subsampling=subsampling)
    with Image.open(file) as image:
        image.draft("RGB", (203 // reduction, 150 // reduction))
        expected = np.array(image)
    status, ours, _ = decode_bytes(file.getvalue(), 203, 150, reduction=reduction)
    assert status == OK
    assert ours.shape == (-(-150 // reduction), -(-203 // reduction), 3)
    assert (ours == expected).all()


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
