"""Turns the bytes of an image file into the bytes of a `.beton` sample.

`jpeg` follows FFCV's convention: longest side at most 500, area averaging, quality 90, 4:2:0 chroma. It
encodes every image anew, also one that is small enough: uniform quantisation and chroma keep decoding time
the same for all. `keep` stores a JPEG's bytes as they are and converts, as `jpeg` does, what a reader could
not decode to upright RGB. `raw` stores RGB pixels, limited to the same side.
"""

import zlib
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np

from pipelines.beton_layout import MAX_SIDE, MODE_JPEG, MODE_RAW
from tools.image_colour import to_srgb
from tools.image_decoding import (
    UPRIGHT,
    ImageArray,
    UnusableImage,
    open_image,
    orientation,
    reasons,
    rgb_pixels,
    turn_upright,
)
from tools.jpeg_decoding import decode_jpeg
from tools.restart_index import add_row_index

Encoding = Literal["jpeg", "keep", "raw"]
Colors = Literal["stored", "srgb"]
MAX_JPEG_SIDE = 65500  # libjpeg's limit
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with more behind it, as some cameras write


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How images are stored."""

    encode: Encoding = "jpeg"
    """jpeg: re-encode; keep: JPEG bytes untouched; raw: RGB pixels."""
    max_side: int = 500
    """Longest side in pixels of what is re-encoded or raw; 0 sets no limit."""
    quality: int = 90
    """JPEG quality of what is re-encoded."""
    colors: Colors = "stored"
    """stored: the numbers in the file, as torchvision and published pipelines take them; srgb: what is re-encoded or
    raw is converted from its RGB profile."""

    def __post_init__(self) -> None:
        if self.encode not in get_args(Encoding):
            raise ValueError(f"`encode` must be one of {get_args(Encoding)}, got {self.encode!r}")
        if self.colors not in get_args(Colors):
            raise ValueError(f"`colors` must be one of {get_args(Colors)}, got {self.colors!r}")
        if not 0 <= self.max_side <= MAX_SIDE:
            raise ValueError(f"`max_side` must be 0 (no limit) to {MAX_SIDE}, got {self.max_side}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"`quality` must be 1 to 100, got {self.quality}")

    def described(self) -> dict[str, str | int]:
        """For manifests; `colors` where they are not as stored."""
        stored: dict[str, str | int] = {"encode": self.encode, "max_side": self.max_side, "quality": self.quality}
        return stored if self.colors == "stored" else {**stored, "colors": self.colors}


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One sample, ready to be written."""

    mode: int
    width: int
    height: int
    data: bytes
    crc32: int
    kept: bool
    """The source's own bytes."""


def encode_image(source: bytes, options: EncodeOptions) -> EncodedImage:
    """Encodes the contents of one image file. Equal input gives equal bytes.

    Raises:
        UnusableImage: it is no image, or not whole, or too large to be stored.
    """
    with reasons():
        image = open_image(source)
        turn = orientation(image)
        is_jpeg = image.format in JPEG_FORMATS and image.mode in ("RGB", "L")
        may_keep = options.encode == "keep" and is_jpeg and turn == UPRIGHT
        if may_keep and decode_jpeg(source, denominator=8) is not None:
            width, height = image.size
            return _sample(MODE_JPEG, (height, width), source, kept=True)
        pixels = decode_jpeg(source) if is_jpeg else None
        pixels = rgb_pixels(image) if pixels is None else turn_upright(pixels, turn)
        pixels = shrink(pixels, options.max_side)
        if options.colors == "srgb":
            pixels = to_srgb(pixels, image.info.get("icc_profile"))
        limit = MAX_SIDE if options.encode == "raw" else MAX_JPEG_SIDE
        if max(pixels.shape) > limit:
            raise UnusableImage(f"is {pixels.shape[1]}×{pixels.shape[0]} pixels; no side may exceed {limit}")
        if options.encode == "raw":
            return _sample(MODE_RAW, pixels.shape, pixels.tobytes())
        return _sample(MODE_JPEG, pixels.shape, encode_jpeg(pixels, options.quality))


def shrink(pixels: ImageArray, max_side: int) -> ImageArray:
    """Area-averages [H, W, 3] to a longest side of `max_side`; the other is rounded down, at least 1."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    if max_side == 0 or longest <= max_side:
        return pixels
    size = (max(1, width * max_side // longest), max(1, height * max_side // longest))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def encode_jpeg(pixels: ImageArray, quality: int) -> bytes:
    """A baseline 4:2:0 JPEG of RGB [H, W, 3], by the encoder that FFCV uses, with an index of its rows."""
    parameters = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        cv2.IMWRITE_JPEG_RST_INTERVAL,
        -(-pixels.shape[1] // 16),  # blocks in a row
    ]
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), parameters)
    if not done:
        raise UnusableImage(f"cannot be encoded as JPEG at {pixels.shape[1]}×{pixels.shape[0]} pixels")
    return add_row_index(encoded.tobytes())


def _sample(mode: int, shape: tuple[int, ...], data: bytes, kept: bool = False) -> EncodedImage:
    height, width = shape[:2]
    return EncodedImage(mode=mode, width=width, height=height, data=data, crc32=zlib.crc32(data), kept=kept)
