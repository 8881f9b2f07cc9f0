import struct
import tracemalloc

import numpy as np
import pytest

from pipelines.beton import MODE_JPEG, MODE_RAW, BetonError, open_beton
from tests.pipelines.handmade_beton import ALLOCATION, HEADER, HandmadeBeton, Sample, three_samples


@pytest.fixture
def written(tmp_path):
    """Writes bytes to a file and returns its path."""

    def write(data, name="set.beton"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def patched(data: bytes, position: int, fmt: str, *values: int) -> bytes:
    return data[:position] + struct.pack(fmt, *values) + data[position + struct.calcsize(fmt) :]


def refusal(path) -> str:
    with pytest.raises(BetonError) as caught:
        open_beton(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_reads_a_handmade_file_value_for_value(written):
    handmade = three_samples()
    path = written(handmade.data)
    beton = open_beton(str(path))
    assert beton.path == path
    assert (beton.num_samples, beton.page_size) == (3, 4096)
    assert beton.modes.tolist() == [MODE_JPEG, MODE_RAW, MODE_JPEG]
    assert beton.widths.tolist() == [640, 2, 65535]
    assert beton.heights.tolist() == [480, 3, 1]
    assert beton.labels.tolist() == [7, -1, 2**40]
    assert beton.sizes.tolist() == [12, 18, 11]
    start = handmade.parts["data"]
    assert beton.offsets.tolist() == [start, start + 12, start + 30]
    for i, sample in enumerate(handmade.samples):
        assert beton.encoded(i).tobytes() == sample.data
    dtypes = {name: getattr(beton, name).dtype.name for name in ("modes", "widths", "heights", "offsets")}
    assert dtypes == {"modes": "uint8", "widths": "int32", "heights": "int32", "offsets": "int64"}
    assert beton.sizes.dtype == beton.labels.dtype == np.int64


def test_nothing_can_be_written_through_it(written):
    beton = open_beton(written(three_samples().data))
    for array in (beton.data, beton.encoded(0), beton.offsets, beton.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_an_index_outside_is_an_index_error(written):
    with pytest.raises(IndexError):
        open_beton(written(three_samples().data)).encoded(3)


def test_the_allocation_table_may_be_in_any_order(written):
    handmade = three_samples()
    start = handmade.parts["table"]
    entries = [handmade.data[start + i * 24 : start + (i + 1) * 24] for i in (2, 0, 1)]
    beton = open_beton(written(handmade.data[:start] + b"".join(entries)))
    assert beton.sizes.tolist() == [12, 18, 11]


def test_other_fields_and_any_order_are_passed_over(written):
    """bytes, label, float, image: metadata are <QQ q d BHHQ>, and each caption lies before its image."""
    position = 1 << 21
    text, image = b"a caption", bytes(range(12))
    descriptors = b"".join(
        struct.pack("<B16s1024s", kind, name, b"\1" * 1024)
        for kind, name in ((3, b"caption"), (1, b"class"), (0, b"weight"), (2, b"photo"))
    )
    metadata = struct.pack("<QQqdBHHQ3x", position, len(text), 5, 0.5, 1, 2, 2, position + len(text))
    empty = struct.pack("<QQqdBHHQ3x", position + 21, 0, 6, 0.5, 1, 2, 2, position + 21)
    table = ALLOCATION.pack(0, position, len(text)) + ALLOCATION.pack(0, position + len(text), len(image))
    table += ALLOCATION.pack(1, position + 21, len(image)) + ALLOCATION.pack(1, position + 21, 0)
    head = HEADER.pack(2, 4, 1 << 21, 2, 2 << 21) + descriptors + metadata + empty
    data = (head.ljust(position, b"\0") + text + image + image[::-1]).ljust(2 << 21, b"\0") + table
    beton = open_beton(written(data))
    assert beton.labels.tolist() == [5, 6]
    assert beton.encoded(0).tobytes() == image
    assert beton.encoded(1).tobytes() == image[::-1], "the empty caption shares the image's pointer"


def test_a_file_without_integers_has_no_labels(written):
    data = patched(three_samples().data, HEADER.size + 1041, "<B", 0)  # the label's eight bytes read as a float
    assert open_beton(written(data)).labels is None


def test_missing_empty_and_foreign_files_are_refused(written, tmp_path):
    assert "no such file; make one with `python -m tools.convert`" in refusal(tmp_path / "nothing.beton")
    assert "no regular file" in refusal(tmp_path)
    assert "found 0 bytes" in refusal(written(b""))
    assert "found 5 bytes" in refusal(written(b"hello"))
    assert "format version 2, found 19280" in refusal(written(b"PK\3\4" + bytes(1000)))  # a ZIP
    assert "format version 2" in refusal(written(b"\x89PNG\r\n\x1a\n" + bytes(100)))


def test_what_stock_ffcv_leaves_when_killed_is_named_half_written(written):
    data = patched(three_samples().data, 16, "<Q", 0)
    assert "half-written" in refusal(written(data))


def test_truncation_at_every_boundary_is_refused(written):
    handmade = three_samples()
    lengths = {boundary + shift for boundary in handmade.parts.values() for shift in (-1, 0, 1, 17)}
    for length in sorted(length for length in lengths if 0 <= length < handmade.parts["end"]):
        message = refusal(written(handmade.data[:length]))
        assert "convert the images anew" in message
        assert ("torn" if length >= HEADER.size else f"found {length} bytes") in message


@pytest.mark.parametrize("num_entries", [0, 1, 2])
def test_a_part_of_the_allocation_table_is_not_good_enough(written, num_entries):
    handmade = three_samples()
    message = refusal(written(handmade.data[: handmade.parts["table"] + 24 * num_entries]))
    expected = f"no entry for sample {num_entries}" if num_entries else "the allocation table is missing"
    assert expected in message


@pytest.mark.parametrize("num_samples", [10**6, 2**40, 2**62, 2**64 - 1])
def test_an_absurd_count_allocates_nothing(written, num_samples):
    path = written(patched(three_samples().data, 8, "<Q", num_samples))
    tracemalloc.start()
    try:
        assert f"metadata of {num_samples} samples" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_impossible_header_and_fields_are_refused(written):
    good = three_samples()
    for offset, fmt, value, expected in [
        (0, "<H", 3, "format version 2, found 3"),
        (2, "<H", 0, "RGB image field"),
        (2, "<H", 65535, "field descriptors need"),
        (4, "<I", 0, "power of two, found 0"),
        (4, "<I", 3 << 20, "power of two, found 3145728"),
        (8, "<Q", 0, "at least one sample, found none"),
        (16, "<Q", len(good.data) + 1, "torn"),
        (16, "<Q", 2**64 - 1, "torn"),
        (24, "<B", 255, "found 255 for field 'image'"),
        (24, "<B", 7, "found 7 for field 'image'"),
        (24, "<B", 1, r"found field types [1, 1]"),
    ]:
        assert expected in refusal(written(patched(good.data, offset, fmt, value))), expected


def test_impossible_samples_are_refused_by_number(written):
    good = three_samples()
    row, entry, start = good.parts["metadata"], good.parts["table"], good.parts["data"]
    for offset, fmt, value, expected in [
        (row + 24, "<B", 2, "sample 1 must have mode 0 (JPEG) or 1 (raw), found 2"),
        (row + 1, "<H", 0, "sample 0 is empty: 0×480 pixels in 12 bytes"),
        (row + 3, "<H", 0, "sample 0 is empty: 640×0 pixels"),
        (row + 24 + 1, "<H", 3, "raw sample 1 of 3×3 pixels must have 27 bytes, found 18"),
        (row + 5, "<Q", start + 12, "no entry for sample 0"),  # sample 1's bytes
        (row + 5, "<Q", 2**64 - 1, "no entry for sample 0"),
        (entry + 48 + 8, "<Q", 2**64 - 5, "no entry for sample 2"),
        (entry + 24, "<Q", 2, "no entry for sample 1"),  # said to be sample 2's
        (entry + 16, "<Q", 2**64 - 1, "torn: sample 0 has 18446744073709551615 bytes"),
        (entry + 48 + 16, "<Q", 1 << 21, "torn: sample 2 has 2097152 bytes"),
        (entry + 16, "<Q", 0, "sample 0 is empty: 640×480 pixels in 0 bytes"),
    ]:
        assert expected in refusal(written(patched(good.data, offset, fmt, value))), expected


def test_a_sample_inside_the_tables_is_refused(written):
    good = three_samples()
    inside = good.parts["metadata"]
    data = patched(good.data, good.parts["metadata"] + 5, "<Q", inside)
    data = patched(data, good.parts["table"] + 8, "<Q", inside)
    assert f"sample 0 has 12 bytes from byte {inside} on, outside the data" in refusal(written(data))


def test_mutated_tables_open_safely_or_are_refused(written):
    """Whatever bits are flipped: a BetonError, or a Beton whose samples all lie inside the file."""
    good = three_samples()
    parts = good.parts
    fields = [*range(parts["fields"], parts["fields"] + 32), parts["fields"] + 1041]
    tables = [*range(HEADER.size), *fields, *range(parts["metadata"], parts["metadata"] + 72)]
    tables += range(parts["table"], parts["end"])
    rng = np.random.default_rng(0)
    num_opened = num_refused = 0
    for _ in range(600):
        data = bytearray(good.data)
        for _ in range(rng.integers(1, 4)):
            data[rng.choice(tables)] ^= 1 << rng.integers(8)
        path = written(bytes(data))
        try:
            beton = open_beton(path)
        except BetonError:
            num_refused += 1
            continue
        num_opened += 1
        assert np.all(beton.offsets >= HEADER.size)
        assert np.all(beton.offsets + beton.sizes <= len(data))
        assert [beton.encoded(i).size for i in range(beton.num_samples)] == beton.sizes.tolist()
    assert min(num_opened, num_refused) > 50, "the mutations should meet both outcomes"


def test_many_samples_in_scattered_order(written):
    """40,000 raw pixels, their allocations shuffled as several writing processes leave them."""
    n = 40_000
    handmade = HandmadeBeton([Sample(b"abc", width=1, height=1, mode=1, label=3)] * 2).build()
    rng = np.random.default_rng(1)
    place = rng.permutation(n)
    row = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8"), ("pad", "V3"), ("y", "<i8")])
    start = 1 << 21
    rows = np.zeros(n, row)
    rows["mode"], rows["width"], rows["height"] = 1, 1, 1
    rows["ptr"], rows["y"] = start + 3 * place, np.arange(n)
    table = np.zeros((n, 3), "<u8")
    table[:, 0], table[:, 1], table[:, 2] = np.arange(n), rows["ptr"], 3
    head = HEADER.pack(2, 2, 1 << 21, n, 2 * start) + handmade.data[24 : 24 + 2082] + rows.tobytes()
    content = np.arange(3 * n, dtype=np.uint32).astype(np.uint8).tobytes()
    data = (head.ljust(start, b"\0") + content).ljust(2 * start, b"\0")
    beton = open_beton(written(data + rng.permutation(table).tobytes()))
    assert beton.num_samples == n
    assert np.array_equal(beton.offsets, start + 3 * place)
    assert np.array_equal(beton.labels, np.arange(n))
    i = int(rng.integers(n))
    assert beton.encoded(i).tolist() == [(3 * place[i] + k) % 256 for k in range(3)]
