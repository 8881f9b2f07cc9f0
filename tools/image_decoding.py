"""Decodes an image file of any common kind into upright 8-bit RGB.

Rules, where viewers differ: transparent pixels are laid over white; 16-bit channels keep their high byte;
CMYK is converted without a colour profile, as Pillow and TensorFlow do, and Adobe's inverted CMYK JPEGs are
righted; EXIF orientation is applied; of an animation the first frame is taken, of a HEIF file the primary image.
Colour profiles are for `tools.image_colour`. A file that cannot be read whole is refused, never filled up with gray.

Shapes: H height, W width; images are uint8 [H, W, 3].
"""

import errno
import functools
import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tools.image_kinds import HEAD_BYTES, is_heif, what_it_is

ImageArray = NDArray[np.uint8]

# Decoded by Pillow itself. Others are no photographs, or are handed to foreign programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ORIENTATION_TAG = 0x0112
DNG_VERSION_TAG = 0xC612
SUBFILE_TYPE_TAG = 0x00FE
REDUCED_RESOLUTION = 1  # in the subfile type: the raw formats' first picture is a preview
UPRIGHT = 1
MAX_FILE_BYTES = 1 << 30  # a film or an archive in the folder must not fill the memory

# EXIF orientation → the turn that rights the image (TIFF 6.0, "Orientation").
_RIGHTED: dict[int, Callable[[ImageArray], ImageArray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


# The disk or the network gave up: the next file would fare no better, and the same file perhaps well a minute later.
_MEDIUM_ERRORS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


class UnusableImage(ValueError):
    """A file that cannot become a sample; the message is the reason."""


@contextmanager
def codec_settings() -> Iterator[None]:
    """Sets the libraries up for many decoding threads, for the block.

    Pillow refuses decompression bombs and keeps quiet about flaws that do not touch pixels; OpenCV starts no
    threads of its own. These settings belong to the process: enter this once, around the threads.
    """
    Image.init()  # Pillow registers the rarer formats only when asked
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        cv2.setNumThreads(threads)


def read_file(path: Path) -> bytes:
    """The bytes of a regular file (opening a pipe or a device could block for ever).

    Raises:
        UnusableImage: there is none, it may not be read, or its first bytes show a video or the like.
        OSError: the disk or the network failed.
    """
    try:
        if not path.is_file():
            missing = "no such file (a dangling link)" if path.is_symlink() else "no such file"
            raise UnusableImage("is not a regular file" if path.exists() else missing)
        with path.open("rb") as file:
            _refuse_other_kinds(file.read(HEAD_BYTES))  # before the whole of a film is read
            if path.stat().st_size > MAX_FILE_BYTES:
                raise UnusableImage(f"is too large: {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
            file.seek(0)
            return file.read()
    except OSError as error:
        if error.errno in _MEDIUM_ERRORS:
            raise
        raise UnusableImage(f"cannot be read: {error.strerror or error}") from error


def open_image(data: bytes) -> Image.Image:
    """Recognises the format and reads the header; pixels are decoded later. Raises as Pillow does.

    Raises:
        UnusableImage: it is no image, but something that is known.
    """
    _refuse_other_kinds(data[:HEAD_BYTES])
    if is_heif(data[:HEAD_BYTES]):
        _register_heif()
        return Image.open(io.BytesIO(data), formats=("HEIF",))
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.format == "TIFF" and _is_raw(image):
        raise UnusableImage("is not an image of a known format, but a camera raw file; export it as JPEG or TIFF")
    if image.format == "PNG":  # whose pixels have checksums, which `load` does not look at
        Image.open(io.BytesIO(data), formats=FORMATS).verify()
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; broken EXIF counts as upright."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, UPRIGHT)
    except (ValueError, SyntaxError, KeyError, TypeError, OSError, struct.error):
        return UPRIGHT
    return value if value in _RIGHTED else UPRIGHT


def rgb_pixels(image: Image.Image) -> ImageArray:
    """Decodes the whole image by Pillow: uint8 [H, W, 3], upright. Raises as Pillow does."""
    image.load()
    # Asked for after `load`: Pillow's TIFF reader turns the image itself.
    return turn_upright(_to_rgb(image), orientation(image))


def turn_upright(pixels: ImageArray, exif_orientation: int) -> ImageArray:
    """Rights uint8 [H, W, 3] whose file has this EXIF orientation; [W, H, 3] from 5 on."""
    if exif_orientation == UPRIGHT:
        return pixels
    return np.ascontiguousarray(_RIGHTED[exif_orientation](pixels))


@contextmanager
def reasons() -> Iterator[None]:
    """Turns whatever a malformed file raises in the codecs into `UnusableImage`.

    Pillow's plugins parse untrusted bytes and let errors of a dozen types through (struct.error, IndexError,
    SyntaxError, MemoryError…). One odd file among a million must not end a conversion.
    """
    try:
        yield
    except UnusableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImage("is not an image of a known format, or not whole") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableImage(f"is too large to be decoded: {error}") from error
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise UnusableImage(f"cannot be decoded: {message}") from error


def _refuse_other_kinds(head: bytes) -> None:
    if not head:
        raise UnusableImage("is empty: 0 bytes")
    if kind := what_it_is(head):
        raise UnusableImage(f"is not an image of a known format, but {kind}")


@functools.cache
def _register_heif() -> None:
    # One thread an image: there are as many images at a time as cores. No previews stand in for a photograph.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)


def _is_raw(image: Image.Image) -> bool:
    """Whether a TIFF is a camera's raw file (DNG, NEF, ARW…), of which Pillow would show the preview."""
    tags = getattr(image, "tag_v2", {})
    subfile_type = tags.get(SUBFILE_TYPE_TAG, 0)
    return DNG_VERSION_TAG in tags or (isinstance(subfile_type, int) and subfile_type & REDUCED_RESOLUTION == 1)


def _to_rgb(image: Image.Image) -> ImageArray:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # whose samples have 16 at most
        gray = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise UnusableImage("has 32-bit samples, whose range is not known; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
