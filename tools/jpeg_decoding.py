"""Decodes JPEGs with the libjpeg-turbo that training decodes them with.

So what it complains of is met here, at conversion, and not in the second week of a run: Pillow fills the
missing rest of some damaged files with gray and says nothing.

Shapes: H height, W width.
"""

import ctypes

import numpy as np

from pipelines.beton_layout import most_pixels
from pipelines.decode.turbojpeg import LIMIT_SCANS, TOO_MANY_SCANS, Decompressor, is_harmless, library
from tools.image_decoding import ImageArray, UnusableImage

RGB = 0  # TJPF_RGB
WARNING = 0  # TJERR_WARNING; anything else is fatal


def decode_jpeg(source: bytes, denominator: int = 1) -> ImageArray | None:
    """Decodes a whole RGB or gray JPEG to uint8 [⌈H/denominator⌉, ⌈W/denominator⌉, 3], bit-equal to Pillow.

    Args:
        source: a JPEG file; its EXIF orientation is not heeded.
        denominator: 1, 2, 4 or 8. At 8 the stream is read to its end, but most of the arithmetic is spared.

    Returns:
        None if libjpeg-turbo does not read this kind (CMYK, 12 bits, lossless, odd chroma) or cannot at all.

    Raises:
        UnusableImage: the file is damaged; libjpeg-turbo would go on with a part of its pixels. Or it claims more than
            its bytes can hold.
    """
    turbojpeg = library()
    decompressor = Decompressor()
    handle = ctypes.c_void_p(decompressor.handle)
    data, size = ctypes.c_char_p(source), ctypes.c_ulong(len(source))
    width, height, subsampling, colorspace = (ctypes.c_int() for _ in range(4))

    def undecodable(status: int) -> bool:
        if status == 0:
            return False
        warning = decompressor.last_error()
        if TOO_MANY_SCANS in warning:
            raise UnusableImage(f"has {TOO_MANY_SCANS}")
        if turbojpeg.tjGetErrorCode(handle) != WARNING:
            return True
        if is_harmless(warning, source):
            return False
        raise UnusableImage(f"is damaged: {warning}")

    try:
        if undecodable(
            turbojpeg.tjDecompressHeader3(
                handle,
                data,
                size,
                ctypes.byref(width),
                ctypes.byref(height),
                ctypes.byref(subsampling),
                ctypes.byref(colorspace),
            )
        ):
            return None
        if width.value * height.value > most_pixels(len(source)):
            raise UnusableImage(f"cannot be an image of {width.value}×{height.value} pixels in {len(source)} bytes")
        shape = (-(-height.value // denominator), -(-width.value // denominator), 3)
        pixels = np.empty(shape, np.uint8)
        out = ctypes.c_void_p(pixels.ctypes.data)
        if undecodable(turbojpeg.tjDecompress2(handle, data, size, out, shape[1], 0, shape[0], RGB, LIMIT_SCANS)):
            return None
        return pixels
    finally:
        decompressor.close()
