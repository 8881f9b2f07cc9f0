"""Every kind of file that a folder of images holds in practice, with the pixels it stands for or why it is
no image.

`usable_files` maps file names to (bytes, expected RGB pixels, tolerance in levels); pixels are worked out
with numpy from the picture that was stored, never by decoding the file with the code under test.
`unusable_files` maps names to (bytes, a part of the reason).
"""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps

JPEG_TOLERANCE = 12  # smooth pictures at quality 95


def picture(height=24, width=40):
    """A smooth RGB picture without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([40 + 4 * x, 200 - 3 * y - x, 30 + 5 * y + x], axis=-1).clip(0, 255).astype(np.uint8)


def saved(image, kind, **options):
    """The bytes of a Pillow image, or of an array, in a format."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(pixels, **options):
    return saved(pixels, "JPEG", **{"quality": 95, **options})


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def ycck_jpeg(cmyk):
    """An Adobe YCCK JPEG of CMYK pixels: Pillow's CMYK JPEG with other samples and transform 2."""
    ycc = np.asarray(Image.fromarray(cmyk[..., :3]).convert("YCbCr"))
    samples = np.concatenate([ycc, 255 - cmyk[..., 3:]], axis=-1)  # Adobe stores K inverted
    data = bytearray(saved(Image.fromarray(255 - samples, "CMYK"), "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def gray(levels):
    return np.repeat(levels[..., None], 3, axis=-1)


def over_white(rgb, alpha):
    return np.round(rgb * (alpha[..., None] / 255) + 255 - alpha[..., None].astype(float)).astype(np.uint8)


def pgm16(levels):
    """Netpbm's own format, 16 bits, of uint16 [H, W]."""
    return b"P5 %d %d 65535\n" % levels.shape[::-1] + levels.astype(">u2").tobytes()


def usable_files():
    rgb = picture()
    levels = rgb[..., 0]
    alpha = np.linspace(0, 255, rgb.shape[1]).astype(np.uint8)[None].repeat(rgb.shape[0], axis=0)
    cmyk = np.concatenate([rgb // 2, (rgb[..., :1] // 3)], axis=-1)
    from_cmyk = np.clip((255 - cmyk[..., :3].astype(int)) * (255 - cmyk[..., 3:].astype(int)) / 255, 0, 255)
    indices = (np.arange(rgb.shape[1]) // 10).astype(np.uint8)[None].repeat(rgb.shape[0], axis=0)  # four bands
    palette = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30], [250, 240, 230]], np.uint8)
    indexed = Image.fromarray(indices, "P")
    indexed.putpalette(palette.tobytes())
    keyed = np.where((indices == 1)[..., None], 255, palette[indices])
    red, blue = (Image.new("RGB", (9, 5), colour) for colour in ("red", "blue"))
    panorama = np.full((2, 3000, 3), (10, 200, 90), np.uint8)
    deep = rgb.astype(np.uint16) * 257

    files = {
        "plain.png": (saved(rgb, "PNG"), rgb, 0),
        "plain.jpg": (jpeg(rgb), rgb, JPEG_TOLERANCE),
        "444.jpg": (jpeg(rgb, subsampling="4:4:4"), rgb, JPEG_TOLERANCE),
        "progressive.jpeg": (jpeg(rgb, progressive=True), rgb, JPEG_TOLERANCE),
        "really_a_png.jpg": (saved(rgb, "PNG"), rgb, 0),
        "no_suffix": (saved(rgb, "BMP"), rgb, 0),
        "plain.webp": (saved(rgb, "WEBP", lossless=True), rgb, 0),
        "plain.tif": (saved(rgb, "TIFF"), rgb, 0),
        "plain.ppm": (saved(rgb, "PPM"), rgb, 0),
        "gray.png": (saved(levels, "PNG"), gray(levels), 0),
        "gray.jpg": (jpeg(levels), gray(levels), JPEG_TOLERANCE),
        "gray_alpha.png": (
            saved(Image.merge("LA", [Image.fromarray(levels), Image.fromarray(alpha)]), "PNG"),
            over_white(gray(levels), alpha),
            1,
        ),
        "one_bit.png": (
            saved(Image.fromarray(levels > 100), "PNG"),
            gray(np.where(levels > 100, 255, 0)),
            0,
        ),
        "gray16.png": (saved(levels.astype(np.uint16) * 257, "PNG"), gray(levels), 0),
        "gray16_dark.png": (saved(levels.astype(np.uint16), "PNG"), np.zeros_like(rgb), 0),
        "gray16.tif": (saved(levels.astype(np.uint16) * 257, "TIFF"), gray(levels), 0),
        "gray16.pgm": (pgm16(levels.astype(np.uint16) * 257), gray(levels), 0),
        "rgb16.png": (cv2.imencode(".png", deep[..., ::-1])[1].tobytes(), rgb, 0),
        "palette.png": (saved(indexed, "PNG"), palette[indices], 0),
        "palette_transparent.png": (saved(indexed, "PNG", transparency=1), keyed, 0),
        "colour_key.png": (saved(palette[indices], "PNG", transparency=(0, 255, 0)), keyed, 0),
        "rgba.png": (saved(np.dstack([rgb, alpha]), "PNG"), over_white(rgb, alpha), 1),
        "rgba.webp": (
            saved(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True),
            over_white(rgb, alpha),
            1,
        ),
        "cmyk.jpg": (saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=95), from_cmyk, JPEG_TOLERANCE),
        "ycck.jpg": (ycck_jpeg(cmyk), from_cmyk, JPEG_TOLERANCE),
        "cmyk.tif": (saved(Image.fromarray(cmyk, "CMYK"), "TIFF"), from_cmyk, 1),
        "animated.gif": (
            saved(red, "GIF", save_all=True, append_images=[blue]),
            np.full((5, 9, 3), (255, 0, 0)),
            0,
        ),
        "animated.webp": (
            saved(red, "WEBP", save_all=True, append_images=[blue], lossless=True),
            np.full((5, 9, 3), (255, 0, 0)),
            0,
        ),
        "1x1.png": (saved(rgb[:1, :1], "PNG"), rgb[:1, :1], 0),
        "1x1.jpg": (jpeg(rgb[:1, :1]), rgb[:1, :1], JPEG_TOLERANCE),
        "panorama.png": (saved(panorama, "PNG"), panorama[:1, :500], 0),
        "upright.tall.png": (
            saved(panorama.transpose(1, 0, 2), "PNG"),
            panorama[:1, :500].transpose(1, 0, 2),
            0,
        ),
        "garbage_exif.jpg": (jpeg(rgb, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), rgb, JPEG_TOLERANCE),
        "two_pictures.mpo": (
            saved(
                Image.fromarray(rgb),
                "MPO",
                save_all=True,
                append_images=[Image.fromarray(rgb[::-1])],
                quality=95,
            ),
            rgb,
            JPEG_TOLERANCE,
        ),
        "rests.jpg": (jpeg(rgb) + b"trailing bytes", rgb, JPEG_TOLERANCE),
        "rotated.png": (saved(rgb, "PNG", exif=exif(6)), np.rot90(rgb, -1), 0),
        "rotated.tif": (saved(rgb, "TIFF", tiffinfo={0x0112: 6}), np.rot90(rgb, -1), 0),
    }
    for orientation in range(1, 9):
        data = jpeg(rgb, exif=exif(orientation))
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        files[f"exif{orientation}.jpg"] = (data, upright, 0)
    return files


# Among the usable files: JPEGs whose bytes `--encode keep` may store as they are.
KEPT = {
    "plain.jpg",
    "444.jpg",
    "progressive.jpeg",
    "gray.jpg",
    "1x1.jpg",
    "garbage_exif.jpg",
    "two_pictures.mpo",
    "rests.jpg",
    "exif1.jpg",
}


def unusable_files():
    rgb = picture(64, 96)
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    photo, png = jpeg(noise), saved(noise, "PNG")
    huge = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        "empty.jpg": (b"", "is empty: 0 bytes"),
        "text.jpg": (b"<html>404 Not Found</html>", "is not an image of a known format"),
        "notes.txt": (b"remember the milk", "is not an image of a known format"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image of a known format"),
        "half.jpg": (photo[: len(photo) // 2], "is damaged: Premature end of JPEG file"),
        "half_with_end.jpg": (photo[: len(photo) // 2] + b"\xff\xd9", "is damaged: Corrupt JPEG data"),
        "half_progressive.jpg": (
            jpeg(noise, progressive=True)[:-400],
            "is damaged: Premature end of JPEG file",
        ),
        "only_header.jpg": (photo[:20], "is not an image of a known format, or not whole"),
        "half.png": (png[: len(png) // 2], "cannot be decoded: Truncated File Read"),
        "flipped.png": (bytes(damaged), "cannot be decoded: broken PNG file"),
        "half.gif": (saved(noise, "GIF")[:-500], "cannot be decoded: image file is truncated"),
        "half.webp": (saved(noise, "WEBP")[:2000], "cannot be decoded"),
        "half.tif": (saved(rgb, "TIFF")[:-9000], "cannot be decoded"),
        "float.tif": (saved(rgb[..., 0].astype(np.float32), "TIFF"), "has 32-bit samples"),
        "bomb.png": (
            b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", huge) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""),
            "is too large to be decoded",
        ),
    }
