"""What phones and cameras lay into a folder of pictures."""

import io
import plistlib
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageOps

from tests.tools.source_files import heic
from tests.tools.ugly_images import exif, jpeg, picture, saved
from tools.image_colour import SAME_LEVELS, to_srgb
from tools.image_decoding import UnusableImage, _register_heif, open_image, orientation, read_file, reasons, rgb_pixels
from tools.image_encoding import EncodeOptions, encode_image

TOLERANCE = 6  # levels, of HEVC at quality 95


def decoded(data):
    with reasons():
        return rgb_pixels(open_image(data))


def apart(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).max()


def stored(data, **options):
    """Pixels of what a `.beton` holds."""
    sample = encode_image(data, EncodeOptions(**{"encode": "raw", **options}))
    return np.frombuffer(sample.data, np.uint8).reshape(sample.height, sample.width, 3)


class TestHeif:
    @pytest.mark.parametrize("turn", range(1, 9))
    def test_is_upright(self, turn):
        rgb = picture(48, 80)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(saved(rgb, "PNG", exif=exif(turn))))))
        data = heic(rgb, exif=exif(turn).tobytes())
        assert apart(decoded(data), upright) <= TOLERANCE
        assert orientation(open_image(data)) == 1
        assert apart(stored(data), upright) <= TOLERANCE

    def test_ten_bits_and_gray_and_transparency(self):
        rgb = picture(48, 80)
        deep = pillow_heif.from_bytes("RGB;16", (80, 48), (rgb.astype(np.uint16) * 257).tobytes())
        stream = io.BytesIO()
        deep.save(stream, quality=95, chroma=444)
        assert pillow_heif.open_heif(stream.getvalue(), convert_hdr_to_8bit=False).mode == "RGB;16"
        assert apart(decoded(stream.getvalue()), rgb) <= TOLERANCE
        gray = decoded(heic(Image.fromarray(rgb[..., 0])))
        assert apart(gray, np.repeat(rgb[..., :1], 3, axis=2)) <= TOLERANCE
        clear = decoded(heic(np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])))
        assert apart(clear, np.full_like(rgb, 255)) <= TOLERANCE

    def test_of_a_sequence_the_primary_image(self):
        first, second = Image.fromarray(picture(48, 80)), Image.fromarray(picture(48, 80)[::-1].copy())
        data = heic(first, second, primary_index=1)
        assert open_image(data).n_frames == 2
        assert apart(decoded(data), np.asarray(second)) <= TOLERANCE

    def test_nobody_need_have_registered_it(self):
        data = heic(picture(48, 80))
        Image.OPEN.pop("HEIF")
        Image.ID.remove("HEIF")
        _register_heif.cache_clear()
        assert apart(decoded(data), picture(48, 80)) <= TOLERANCE

    def test_keep_converts_it(self):
        sample = encode_image(heic(picture(48, 80)), EncodeOptions(encode="keep"))
        assert not sample.kept
        assert sample.data.startswith(b"\xff\xd8")

    def test_torn_files_are_refused(self):
        data = heic(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
        for length in (40, 300, len(data) // 2, len(data) - 100):
            with pytest.raises(UnusableImage):
                decoded(data[:length])

    def test_many_threads_decode_at_a_time(self):
        files = [heic(picture(64 + 8 * i, 96)) for i in range(4)]
        alone = [decoded(data) for data in files]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(decoded, files * 8))
        assert all((pixels == alone[i % 4]).all() for i, pixels in enumerate(together))

    def test_avif_is_still_read(self):
        rgb = picture(48, 80)
        assert apart(decoded(saved(rgb, "AVIF", quality=95, subsampling="4:4:4")), rgb) <= 2 * TOLERANCE


def icc_profile(primaries, gamma):
    """A matrix profile (ICC.1:2001) of RGB with these columns of XYZ (D50) and a power curve, or sRGB's."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    steps = np.linspace(0, 1, 1024)
    srgb = np.where(steps <= 0.04045, steps / 12.92, ((steps + 0.055) / 1.055) ** 2.4)
    levels = [round(gamma * 256)] if gamma else (srgb * 65535).round().astype(int)
    curve = b"curv\0\0\0\0" + struct.pack(f">I{len(levels)}H", len(levels), *levels)
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0x\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += struct.pack(">6H4s", 2024, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


# Display P3's columns, adapted to D50 (as in Apple's profile), and sRGB's (IEC 61966-2.1).
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def by_formula(rgb, columns, gamma):
    """sRGB of pixels in the space of a matrix profile, in float64."""
    linear = (rgb / 255.0) ** gamma @ np.array(columns) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255)


class TestColourProfiles:
    def test_wide_gamuts_become_srgb(self):
        rgb = (80 + 0.4 * picture(48, 80)).astype(np.uint8)  # within both gamuts
        profile = icc_profile(P3, 2.2)
        expected = by_formula(rgb, P3, 2.2)
        assert np.abs(expected - rgb).max() > 15  # as they are the colours would be wrong
        assert np.abs(to_srgb(rgb, profile) - expected).max() <= 3
        for data in (
            saved(rgb, "PNG", icc_profile=profile),
            jpeg(rgb, quality=100, subsampling=0, icc_profile=profile),
        ):
            assert np.abs(stored(data, colors="srgb") - expected).max() <= 6
            assert np.abs(stored(data).astype(int) - rgb).max() <= 3  # nobody asked
        assert np.abs(stored(heic(rgb, icc_profile=profile), colors="srgb") - expected).max() <= 2 * TOLERANCE

    def test_srgb_by_any_name_changes_nothing(self):
        rgb = picture(48, 80)
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for data in (b"", profile, b"no profile", profile[:200], icc_profile(P3, 2.2).replace(b"RGB ", b"GRAY")):
            assert (to_srgb(rgb, data) == rgb).all()
        assert (stored(saved(rgb, "PNG", icc_profile=profile), colors="srgb") == rgb).all()
        nearly = icc_profile(np.array(SRGB) * 0.99, None)
        assert 0 < np.abs(by_formula(rgb, np.array(SRGB) * 0.99, 2.2) - by_formula(rgb, SRGB, 2.2)).max() <= SAME_LEVELS
        assert (to_srgb(rgb, nearly) == rgb).all()

    def test_without_a_profile_the_bytes_are_those_of_the_pixels(self):
        rgb = picture(48, 80)
        assert (to_srgb(rgb, None) == rgb).all()
        tagged, bare = saved(rgb, "PNG", icc_profile=b"broken"), saved(rgb, "PNG")
        options = EncodeOptions(colors="srgb")
        assert encode_image(tagged, options).data == encode_image(bare, options).data

    def test_keep_leaves_the_bytes(self):
        data = jpeg(picture(), icc_profile=icc_profile(P3, 2.2))
        assert encode_image(data, EncodeOptions(encode="keep", colors="srgb")).data == data

    def test_profiles_of_cmyk_and_gray_are_not_applied(self):
        levels = picture()[..., 0]
        gray = saved(levels, "PNG", icc_profile=icc_profile(P3, 2.2).replace(b"RGB ", b"GRAY"))
        assert (stored(gray, colors="srgb") == levels[..., None]).all()


def box(kind, *brands):
    return (
        struct.pack(">I", 16 + 4 * (len(brands) - 1)) + b"ftyp" + brands[0] + b"\0\0\0\0" + b"".join(brands[1:]) + kind
    )


def tiff_preview(**tags):
    """A TIFF as raw files begin: a small preview, with these tags."""
    return saved(picture(), "TIFF", tiffinfo={int(tag[1:]): value for tag, value in tags.items()})


OTHERS = {
    "live.mov": (box(b"moov", b"qt  ", b"qt  "), "a QuickTime video (.mov)"),
    "old.mov": (b"\0\0\0\x08wide\0\0\1\0mdat", "a QuickTime video (.mov)"),
    "film.mp4": (box(b"", b"isom", b"avc1", b"mp41"), "an MP4 video"),
    "film.3gp": (box(b"", b"3gp4", b"3gp4"), "an MP4 video"),
    "memo.m4a": (box(b"", b"M4A ", b"mp42"), "a sound"),
    "film.webm": (b"\x1aE\xdf\xa3" + bytes(20), "a Matroska or WebM video"),
    "film.avi": (b"RIFF\0\0\0\0AVI LIST", "an AVI video"),
    "IMG_1.AAE": (plistlib.dumps({"adjustmentFormatIdentifier": "com.apple.photo"}), "a record of edits (.aae)"),
    "edit.AAE": (
        plistlib.dumps({"adjustmentFormatIdentifier": "com.apple.photo"}, fmt=plistlib.FMT_BINARY),
        "a record of edits (.aae)",
    ),
    "IMG.dng": (tiff_preview(t50706=b"\1\4\0\0"), "a camera raw file"),
    "DSC.nef": (tiff_preview(t254=1), "a camera raw file"),
    "IMG.cr2": (b"II*\0\x10\0\0\0CR\2\0" + bytes(100), "a camera raw file (.cr2)"),
    "IMG.cr3": (box(b"moov", b"crx ", b"crx ", b"isom"), "a camera raw file (.cr3)"),
    "DSCF.raf": (b"FUJIFILMCCD-RAW 0201" + bytes(100), "a camera raw file (.raf)"),
    "page.html": (b"<!DOCTYPE html><html></html>", "a web page"),
    "page.pdf": (b"%PDF-1.7", "a PDF document"),
    "new.jxl": (b"\xff\x0a" + bytes(40), "a JPEG XL image"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_image_is_told_by_its_kind(name):
    data, kind = OTHERS[name]
    with pytest.raises(UnusableImage, match="is not an image of a known format, but ") as error:
        encode_image(data, EncodeOptions())
    assert kind in str(error.value)


def test_a_film_is_not_read_whole(tmp_path):
    film = tmp_path / "film.mov"
    with film.open("wb") as file:
        file.write(box(b"moov", b"qt  ", b"qt  "))
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(UnusableImage, match=r"but a QuickTime video \(\.mov\)"):
        read_file(film)
    (tmp_path / "empty.heic").touch()
    with pytest.raises(UnusableImage, match="is empty: 0 bytes"):
        decoded(read_file(tmp_path / "empty.heic"))


def test_jpegs_of_phones():
    """A gain map (Ultra HDR) or a second picture behind the first, and 48 megapixels."""
    rgb = picture()
    both = saved(Image.fromarray(rgb), "MPO", save_all=True, append_images=[Image.fromarray(rgb[:8, :8])], quality=95)
    assert apart(stored(both), rgb) <= 12
    assert apart(stored(jpeg(rgb) + jpeg(rgb[:8, :8])), rgb) <= 12
    large = jpeg(np.full((6048, 8064, 3), (10, 200, 90), np.uint8), exif=exif(6))
    small = stored(large, max_side=500)
    assert small.shape == (500, 375, 3)
    assert np.abs(small.astype(int) - (10, 200, 90)).max() <= 3
