"""Decoding only the rows that are needed: the same pixels as a whole decode, and no trust in a file's index."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.decode.rows import INDEX_NAME, MAX_BYTES, keep_rows
from tests.pipelines.betons import natural_image
from tools.image_encoding import encode_jpeg
from tools.restart_index import add_row_index

WIDTH, HEIGHT = 203, 150
JPEG = encode_jpeg(np.array(natural_image(WIDTH, HEIGHT, seed=9)), 90)


def whole(jpeg):
    return np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def shortened(jpeg, top, bottom, width=WIDTH, height=HEIGHT):
    """The JPEG of rows [top, bottom), the row of the image that it begins with, and its height."""
    out = np.full(MAX_BYTES, 77, np.uint8)
    encoded = np.frombuffer(jpeg, np.uint8)
    size, first, kept = keep_rows(encoded, width, height, top, bottom, out)
    assert (out[max(size, len(jpeg)) + 2 :] == 77).all()
    return bytes(out[:size]), first, kept


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_rows_of_a_window_are_those_of_a_whole_decode(data):
    top = data.draw(st.integers(0, HEIGHT - 1))
    bottom = data.draw(st.integers(top + 1, HEIGHT))
    jpeg, first, kept = shortened(JPEG, top, bottom)
    if not jpeg:  # nothing to leave out
        assert top <= 16
        assert bottom >= HEIGHT - 16
        return
    ours = whole(jpeg)
    assert ours.shape == (kept, WIDTH, 3)
    assert (ours[top - first : bottom - first] == whole(JPEG)[top:bottom]).all()
    assert first >= top - 16 - 1
    assert first + kept <= bottom + 16 + 1


@pytest.mark.parametrize("sampling", ["420", "444", "422", "440"])
def test_every_chroma_subsampling(sampling):
    pixels = cv2.cvtColor(np.array(natural_image(WIDTH, HEIGHT, seed=3)), cv2.COLOR_RGB2BGR)
    across = 16 if sampling in ("420", "422") else 8
    kind = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, kind, cv2.IMWRITE_JPEG_RST_INTERVAL, -(-WIDTH // across)]
    jpeg = add_row_index(cv2.imencode(".jpg", pixels, options)[1].tobytes())
    part, first, _ = shortened(jpeg, 50, 90)
    assert first > 30
    assert (whole(part)[50 - first : 90 - first] == whole(jpeg)[50:90]).all()


def test_the_index_changes_no_pixel_and_costs_little():
    pixels = np.array(natural_image(500, 375, seed=2))
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    plain = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    ours = encode_jpeg(pixels, 90)
    assert (whole(ours) == whole(plain)).all()
    assert len(ours) < len(plain) + 24 * 12


def test_files_without_an_index_are_left_alone():
    file = io.BytesIO()
    natural_image(WIDTH, HEIGHT, seed=1).save(file, "JPEG", progressive=True)
    for jpeg in (file.getvalue(), JPEG.replace(INDEX_NAME, b"TWVROWZ\0"), b"", b"\xff\xd8", JPEG[:300]):
        assert shortened(jpeg, 60, 70) == (b"", 0, HEIGHT)
    assert shortened(JPEG, 60, 70, height=HEIGHT + 1) == (b"", 0, HEIGHT + 1)
    assert shortened(JPEG, 60, 70, width=WIDTH + 20)[0] == b""


def test_no_bit_of_an_index_can_change_a_pixel():
    start = JPEG.index(INDEX_NAME)
    end = start + len(INDEX_NAME) + 4 * (-(-HEIGHT // 16) + 1)
    expected = whole(JPEG)
    for at in range(start, end):
        for bit in range(8):
            jpeg = JPEG[:at] + bytes([JPEG[at] ^ 1 << bit]) + JPEG[at + 1 :]
            part, first, _ = shortened(jpeg, 50, 60)
            if part:
                assert (whole(part)[50 - first : 60 - first] == expected[50:60]).all(), (at, bit)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_index_or_header_is_never_followed_out_of_the_file(data):
    jpeg = bytearray(JPEG)
    end = JPEG.index(b"\xff\xda")
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(
            st.one_of(st.integers(0, end + 10), st.integers(JPEG.index(INDEX_NAME), JPEG.index(INDEX_NAME) + 60))
        )
        jpeg[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 255])))
    top = data.draw(st.integers(0, HEIGHT - 1))
    part, first, kept = shortened(bytes(jpeg), top, data.draw(st.integers(top + 1, HEIGHT)))
    assert 0 <= first < HEIGHT
    assert len(part) <= len(jpeg) + 2
    assert kept <= HEIGHT
