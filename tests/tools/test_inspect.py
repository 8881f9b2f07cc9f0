import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest, manifest_path
from tests.pipelines.handmade_beton import HandmadeBeton, Sample
from tests.tools.ugly_images import jpeg, picture
from tools import inspect_beton
from tools.convert import convert, convert_images
from tools.convert_places import Places
from tools.image_encoding import EncodeOptions
from tools.inspect_beton import parse_rows
from tools.inspect_facts import inspect

PAGE = 1 << 21
SIZES = {"cat/0.jpg": (40, 60), "cat/1.jpg": (80, 30), "dog/0.jpg": (50, 90), "dog/1.jpg": (100, 100)}  # H, W


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """raw.beton of four images in two of three classes; two files are in quarantine."""
    folder = tmp_path_factory.mktemp("inspect")
    files = {name: jpeg(picture(*size)) for name, size in SIZES.items()}
    files |= {"cat/2.jpg": b"broken", "emu/0.jpg": b"broken"}
    for name, data in files.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    convert(folder / "images", folder / "raw.beton", EncodeOptions(encode="raw"), workers=1, page_size=PAGE)
    convert(folder / "images", folder / "jpeg.beton", EncodeOptions(), workers=1, page_size=PAGE)
    places = Places(dest=folder / "set.shards.json", shard_size=4 * PAGE, page_size=PAGE)
    convert_images(folder / "images", places, EncodeOptions(encode="raw"), workers=1)
    return folder


def facts(path):
    return inspect(open_beton(path), load_manifest(path))


def run(monkeypatch, capsys, *words):
    """The command line; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["inspect_beton", *map(str, words)])
    assert inspect_beton.main() == 0
    return capsys.readouterr().out


def test_the_facts_of_a_file_of_raw_pixels(folder):
    found = facts(folder / "raw.beton")
    bytes_by_hand = [3 * height * width for height, width in SIZES.values()]  # 7200, 7200, 13500, 30000
    assert (found["num_samples"], found["modes"]) == (4, {"jpeg": 0, "raw": 4})
    assert found["num_bytes"] == (folder / "raw.beton").stat().st_size == 2 * PAGE + 4 * 24
    (file,) = found["files"]
    assert (file["sample_bytes"], file["num_pages"]) == (sum(bytes_by_hand), 1)
    tables = 24 + 2 * 1041 + 4 * 24
    assert (file["table_bytes"], file["other_bytes"]) == (tables + 4 * 24, 2 * PAGE - tables - sum(bytes_by_hand))
    assert file["fields"] == [{"name": "image", "type": "image"}, {"name": "label", "type": "int"}]
    assert (file["samples_across_pages"], file["samples_that_overlap"], file["is_in_order"]) == (0, 0, True)
    assert found["bytes"] == {"min": 7200, "5 %": 7200, "median": 13500, "95 %": 30000, "max": 30000, "mean": 14475.0}
    assert (found["width"]["min"], found["width"]["max"], found["height"]["max"]) == (30, 90 + 10, 100)
    assert [row["name"] for row in found["largest"]] == ["dog/1.jpg", "dog/0.jpg", "cat/0.jpg", "cat/1.jpg"]
    assert found["smallest"][0] == {
        "row": 0,
        "name": "cat/0.jpg",
        "label": 0,
        "class": "cat",
        "mode": "raw",
        "width": 60,
        "height": 40,
        "bytes": 7200,
    }
    assert found["classes"] == [
        {"label": 0, "name": "cat", "count": 2},
        {"label": 1, "name": "dog", "count": 2},
        {"label": 2, "name": "emu", "count": 0},
    ]
    decoding = found["decoding"]
    assert (decoding["class"], decoding["bytes_per_thread"], decoding["pixel_bytes"]) == ("raw", 40_000, 57_900)
    assert found["manifest"]["options"] == {"encode": "raw", "max_side": 500, "quality": 90, "page_size": PAGE}
    assert found["manifest"]["quarantine_reasons"] == {"is not an image of a known format, or not whole": 2}


def test_jpegs_are_timed(folder):
    decoding = facts(folder / "jpeg.beton")["decoding"]
    assert (decoding["class"], decoding["bytes_per_thread"]) == ("light", 100_000)
    assert decoding["images_per_sec_per_core"] > 0


def test_shards_are_one_set_of_several_files(folder):
    found = facts(folder / "set.shards.json")
    one = facts(folder / "raw.beton")
    for name in ("num_samples", "modes", "bytes", "width", "classes", "largest"):
        assert found[name] == one[name]
    assert [file["path"] for file in found["files"]] == [str(folder / "set-00000.beton")]


def test_what_ffcv_would_misread_is_counted(tmp_path):
    samples = [Sample(bytes(3 * 500_000), width=500, height=1000, mode=1) for _ in range(3)]
    path = tmp_path / "x.beton"
    path.write_bytes(HandmadeBeton(samples, page_size=PAGE).build().data)
    (file,) = facts(path)["files"]
    assert file["samples_across_pages"] == 2, "1.5 MB each, one after the other, in pages of 2.1 MB"
    assert file["samples_that_overlap"] == 0


def test_the_command_shows_it_and_writes_it(folder, tmp_path, monkeypatch, capsys):
    words = ["--json", tmp_path / "facts.json", "--sheet", tmp_path / "sheet.png", "--rows", "1:3"]
    told = run(monkeypatch, capsys, folder / "raw.beton", *words).splitlines()
    assert told[0] == f"{folder / 'raw.beton'}: 4 images, 4.2 MB"
    assert "stored as   4 raw" in told
    assert "quarantine  2 files were left out" in told
    assert ["2", "raw", "90×50", "13500", "1", "dog", "dog/0.jpg"] in [line.split() for line in told]
    written = json.loads((tmp_path / "facts.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["cat/1.jpg", "dog/0.jpg"]
    assert written["classes"][2]["count"] == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.ndim == 3
    beton = open_beton(folder / "raw.beton")
    pixels = beton.encoded(2).reshape(50, 90, 3)
    assert any(  # 90×50 pixels stand there as they are, enlarged by one
        np.array_equal(sheet[y : y + 50, x : x + 90], pixels)
        for y, x in zip(*np.nonzero((sheet == pixels[0, 0]).all(-1)), strict=True)
    )


def test_a_sample_that_cannot_be_decoded_says_so_in_its_place(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.beton"
    data = bytearray((folder / "jpeg.beton").read_bytes())
    offset = int(open_beton(folder / "jpeg.beton").offsets[1])
    data[offset : offset + 200] = bytes(200)
    path.write_bytes(data)
    run(monkeypatch, capsys, path, "--sheet", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet == (0xF2, 0xD6, 0xD3)).all(-1).sum() == 176 * 176


def test_without_a_manifest_there_are_no_names(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.beton"
    path.write_bytes((folder / "raw.beton").read_bytes())
    assert "manifest    none: no names" in run(monkeypatch, capsys, path)
    assert facts(path)["largest"][0]["name"] is None
    manifest_path(path).write_text("{}")
    assert "found another file" in run(monkeypatch, capsys, path)


def test_damage_is_one_line(folder, tmp_path, monkeypatch):
    path = tmp_path / "x.beton"
    path.write_bytes((folder / "raw.beton").read_bytes()[:-24])
    monkeypatch.setattr(sys, "argv", ["inspect_beton", str(path)])
    with pytest.raises(ValueError, match=r"x\.beton: torn: the allocation table has no entry for sample 3") as caught:
        inspect_beton.main()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", range(5, 6)), ("0:3", range(3)), (":2", range(2)), ("8:", range(8, 10)), ("7:99", range(7, 10))],
)
def test_rows(text, expected):
    assert parse_rows(text, 10) == expected


@pytest.mark.parametrize("text", ["", "x", "3:3", "10", "5:2", "-1", "1:2:3"])
def test_rows_that_are_none(text):
    with pytest.raises(ValueError, match="--rows must "):
        parse_rows(text, 10)


def test_names_cannot_move_the_cursor(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a\x1b[2J\n.jpg").write_bytes(jpeg(picture()))
    convert(tmp_path / "images", tmp_path / "x.beton", EncodeOptions(), workers=1, page_size=PAGE)
    told = run(monkeypatch, capsys, tmp_path / "x.beton", "--sheet", tmp_path / "s.png")
    assert "\x1b" not in told
    assert Image.open(io.BytesIO((tmp_path / "s.png").read_bytes())).size[0] > 0
