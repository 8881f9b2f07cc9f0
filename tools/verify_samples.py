"""Proves the samples of a `.beton`: by their checksums, by decoding them, and against the images they were made of."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from tqdm import tqdm

from pipelines.beton import MODE_JPEG, MODE_RAW, Beton
from pipelines.manifest import Manifest
from tools.image_decoding import ImageArray, UnusableImage, open_image, reasons, rgb_pixels
from tools.image_encoding import Colors, EncodeOptions, Encoding, encode_image
from tools.image_source import ImageSource
from tools.jpeg_decoding import decode_jpeg
from tools.ordered_pool import OrderedMap

MIN_PSNR_DB = 40.0  # two libjpeg versions differ by a level here and there (above 50 dB), other pictures by far more


@dataclass(frozen=True, kw_only=True)
class NamedImages:
    """A source, and its rows by name."""

    source: ImageSource
    rows: dict[str, int]


def check_samples(
    beton: Beton, manifest: Manifest | None, images: NamedImages | None, ordered_map: OrderedMap
) -> Iterator[str]:
    """Yields one line for each sample that is not what it should be."""

    def check(row: int) -> str | None:
        data = beton.encoded(row).tobytes()
        if manifest and zlib.crc32(data) != manifest.crc32[row]:
            return f"its crc32 is {zlib.crc32(data):08x}, the manifest's {manifest.crc32[row]:08x}"
        stated = (int(beton.heights[row]), int(beton.widths[row]))
        try:
            if beton.modes[row] == MODE_JPEG and (found := decode_sample(data).shape[:2]) != stated:
                return f"it is {found[1]}×{found[0]} pixels, its table says {stated[1]}×{stated[0]}"
            if manifest and images and (index := images.rows.get(manifest.files[row])) is not None:
                label, labels = None if beton.labels is None else int(beton.labels[row]), images.source.labels
                if labels is not None and label is not None and labels[index] != label:
                    return f"it has label {label}, its source {labels[index]}"
                return _compare(data, int(beton.modes[row]), images.source, index, manifest)
        except UnusableImage as unusable:
            return f"it {unusable}"
        return None

    rows = range(beton.num_samples)
    for row, problem in tqdm(ordered_map(check, rows), total=len(rows), unit="img", disable=None):
        if problem:
            yield f"{sample_name(manifest, row)}: {problem}"


def encode_options(manifest: Manifest) -> EncodeOptions:
    """How the images were stored. KeyError, TypeError, ValueError if it cannot be understood."""
    options = manifest.options
    return EncodeOptions(
        encode=cast(Encoding, options["encode"]),
        max_side=int(options["max_side"]),
        quality=int(options["quality"]),
        colors=cast(Colors, options.get("colors", "stored")),
    )


def sample_name(manifest: Manifest | None, row: int) -> str:
    """A sample, for people."""
    return f"sample {row} ({manifest.files[row]!r})" if manifest else f"sample {row}"


def _compare(data: bytes, mode: int, source: ImageSource, index: int, manifest: Manifest) -> str | None:
    """Encodes the source's image anew and compares; None if it is the same image."""
    try:
        expected = encode_image(source.read(index), encode_options(manifest))
    except UnusableImage as unusable:
        return f"its source {unusable}"
    if expected.data == data:
        return None
    if expected.kept or MODE_RAW in (mode, expected.mode):
        return "its bytes are not those of its source"
    psnr = _psnr(decode_sample(data), decode_sample(expected.data))
    return None if psnr >= MIN_PSNR_DB else f"it is not the image of its source (PSNR {psnr:.1f} dB)"


def sample_pixels(beton: Beton, row: int, data: bytes) -> ImageArray:
    """The pixels of a sample's stored bytes, uint8 [H, W, 3]. UnusableImage if they cannot be decoded."""
    if beton.modes[row] == MODE_RAW:
        return np.frombuffer(data, np.uint8).reshape(int(beton.heights[row]), int(beton.widths[row]), 3)
    return decode_sample(data)


def decode_sample(jpeg: bytes) -> ImageArray:
    """The pixels of a stored JPEG, uint8 [H, W, 3]. UnusableImage if it cannot be decoded."""
    with reasons():
        pixels = decode_jpeg(jpeg)
        return rgb_pixels(open_image(jpeg)) if pixels is None else pixels


def _psnr(a: ImageArray, b: ImageArray) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, dB; 0 if their sizes differ."""
    if a.shape != b.shape:
        return 0.0
    mean_square = float(np.mean((a.astype(np.float32) - b) ** 2))
    return float(10 * np.log10(255**2 / max(mean_square, 1e-9)))
