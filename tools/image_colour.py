"""Brings pixels whose file carries a colour profile to sRGB, which all else is taken for.

Phones photograph in Display P3 and cameras in Adobe RGB: read as sRGB, their colours are pale. The conversion is
LittleCMS's, with relative colorimetric intent and black point compensation. A profile that changes no colour by more
than `SAME_LEVELS` is sRGB under another name, and leaves the pixels as they are.

Shapes: H height, W width.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from tools.image_decoding import ImageArray

SAME_LEVELS = 3  # the sRGB profiles in use differ by 1 or 2 from one another
_PROBE_STEPS = 9


def to_srgb(pixels: ImageArray, profile: bytes | None) -> ImageArray:
    """Converts uint8 [H, W, 3] from the colours of an ICC profile.

    Without a profile, or with one that is not for RGB or cannot be read, the pixels come back as they are.
    """
    transform = _transform(profile) if profile else None
    return pixels if transform is None else _applied(transform, pixels)


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB":
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # broken profiles are common, and viewers ignore them
        return None
    steps = np.linspace(0, 255, _PROBE_STEPS).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    changes = np.abs(_applied(transform, probe).astype(int) - probe)
    return transform if changes.max() > SAME_LEVELS else None


def _applied(transform: ImageCms.ImageCmsTransform, pixels: ImageArray) -> ImageArray:
    return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))
