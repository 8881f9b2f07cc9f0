import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import MODE_JPEG, MODE_RAW, open_beton
from pipelines.manifest import load_manifest
from tests.tools.ugly_images import KEPT, jpeg, picture, saved, unusable_files, usable_files
from tools import convert_output
from tools.convert import convert, quarantine_path
from tools.convert_journal import open_journal
from tools.convert_progress import read_progress
from tools.image_encoding import EncodeOptions, encode_image, shrink


def write_folder(root, files):
    """Writes {relative name: bytes} below `root` and returns it."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def photos(num_classes=2, num_each=3):
    """Pictures of different sizes as JPEGs, {relative name: bytes}."""
    return {
        f"class{c}/{i}.jpg": jpeg(picture(40 + 7 * i, 60 + 11 * c + i))
        for c in range(num_classes)
        for i in range(num_each)
    }


def decoded(beton, i):
    """Pixels of a stored sample, by Pillow for JPEGs."""
    if beton.modes[i] == MODE_RAW:
        return beton.encoded(i).reshape(beton.heights[i], beton.widths[i], 3)
    return np.asarray(Image.open(io.BytesIO(beton.encoded(i).tobytes())).convert("RGB"))


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9))


def run_convert(*arguments, **options):
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "tools.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def ugly_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ugly")
    files = {f"good/{name}": content[0] for name, content in usable_files().items()}
    files |= {f"mixed/{name}": content[0] for name, content in unusable_files().items()}
    files |= {"mixed/one.jpg": jpeg(picture()), "stray.txt": b"beside the classes", "good/.DS_Store": b"\0"}
    write_folder(root, files)
    (root / "mixed" / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(root / "mixed" / "pipe.jpg")
    return root


class TestUglyFiles:
    @pytest.mark.parametrize("encode", ["jpeg", "keep", "raw"])
    def test_each_is_converted_rightly_or_listed_with_its_reason(self, ugly_folder, tmp_path, encode):
        dest = tmp_path / "ugly.beton"
        manifest = convert(ugly_folder, dest, EncodeOptions(encode=encode), workers=2)
        assert manifest == load_manifest(dest)
        beton = open_beton(dest)
        expected = usable_files()
        names = [f"good/{name}" for name in sorted(expected)] + ["mixed/one.jpg"]
        assert manifest.files == names
        assert beton.labels.tolist() == [0] * len(expected) + [1]
        for i, name in enumerate(sorted(expected)):
            data, pixels, tolerance = expected[name]
            if encode == "keep" and name in KEPT:
                assert beton.encoded(i).tobytes() == data, name
                continue
            found = decoded(beton, i)
            assert found.shape == pixels.shape, name
            if encode == "raw":
                assert np.abs(found.astype(float) - pixels).max() <= tolerance, name
            elif found.size > 300:  # coarse chroma decides about the pixels of a tiny image
                assert psnr(found, pixels) > (21 if name.startswith(("palette", "colour")) else 33), name
        assert set(beton.modes.tolist()) == {MODE_RAW if encode == "raw" else MODE_JPEG}
        num_converted = len(expected) - len(KEPT) if encode == "keep" else 0
        assert manifest.num_converted == num_converted

        reasons = {f"mixed/{name}": reason for name, (_, reason) in unusable_files().items()}
        reasons |= {
            "stray.txt": "lies outside the class folders",
            "mixed/dangling.jpg": "no such file (a dangling link)",
            "mixed/pipe.jpg": "is not a regular file",
        }
        listed = [json.loads(line) for line in quarantine_path(dest).read_text().splitlines()]
        assert listed == [vars(entry) for entry in manifest.quarantined]
        assert {entry["file"] for entry in listed} == set(reasons)
        for entry in listed:
            assert reasons[entry["file"]] in entry["reason"]

    def test_an_unreadable_file_is_listed(self):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            place = Path(folder)  # where another user may enter, unlike `tmp_path`
            place.chmod(0o777)
            files = {"a.png": saved(picture(), "PNG"), "b.png": saved(picture(), "PNG")}
            root = write_folder(place / "source", files)
            root.chmod(0o755)
            (root / "b.png").chmod(0)
            if os.geteuid() == 0:  # root reads everything
                os.seteuid(65534)
                stack.callback(os.seteuid, 0)
            manifest = convert(root, place / "x.beton", EncodeOptions(encode="raw"), workers=1)
        assert manifest.files == ["a.png"]
        assert [vars(entry) for entry in manifest.quarantined] == [
            {"file": "b.png", "reason": "cannot be read: Permission denied"}
        ]

    def test_a_class_without_a_usable_image_keeps_its_label(self, tmp_path):
        files = {
            "a/1.png": saved(picture(), "PNG"),
            "b/1.jpg": b"not one",
            "c/1.png": saved(picture(), "PNG"),
        }
        root = write_folder(tmp_path / "source", files)
        done = run_convert(root, tmp_path / "x.beton")
        assert done.returncode == 0
        assert "2 images, 3 classes (1 without a usable image)" in done.stdout
        assert f"quarantined 1 → {tmp_path / 'x.beton.quarantine.jsonl'}" in done.stdout
        assert open_beton(tmp_path / "x.beton").labels.tolist() == [0, 2]
        manifest = load_manifest(tmp_path / "x.beton")
        assert (manifest.classes, manifest.class_counts) == (["a", "b", "c"], [1, 0, 1])

    def test_nothing_but_the_list_is_written_if_no_file_can_be_used(self, tmp_path):
        root = write_folder(tmp_path / "source", {"a.jpg": b"no", "b.jpg": b"not at all"})
        done = run_convert(root, tmp_path / "x.beton")
        assert done.returncode == 2
        error = done.stderr.splitlines()[-1]
        assert f"none of the 2 files in {root} can be used ('a.jpg' is not an image" in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x.beton.quarantine.jsonl"]
        assert len(quarantine_path(tmp_path / "x.beton").read_text().splitlines()) == 2

    def test_sides_that_the_format_cannot_hold(self):
        long = saved(np.zeros((1, 70_000, 3), np.uint8), "PNG")
        assert encode_image(long, EncodeOptions()).width == 500
        for encode, limit in (("jpeg", 65500), ("raw", 65535)):
            options = EncodeOptions(encode=encode, max_side=0)
            with pytest.raises(ValueError, match=f"is 70000×1 pixels; no side may exceed {limit}"):
                encode_image(long, options)
            widest = saved(np.zeros((1, limit, 3), np.uint8), "PNG")
            assert encode_image(widest, options).width == limit


class TestPixels:
    def test_area_averaging_worked_by_hand(self):
        row = np.array([0, 90, 255], np.uint8)[None, :, None].repeat(3, 2)
        # 3 → 2: each output pixel covers one and a half of the input's.
        assert shrink(row, 2)[0, :, 0].tolist() == [30, 200]
        block = np.arange(16, dtype=np.uint8).reshape(4, 4)[:, :, None].repeat(3, 2) * 10
        assert shrink(block, 2)[..., 0].tolist() == [[25, 45], [105, 125]]

    @pytest.mark.parametrize(
        ("width", "height", "expected"),
        [
            (500, 375, (500, 375)),
            (501, 375, (500, 374)),
            (1001, 1000, (500, 499)),
            (30, 1000, (15, 500)),
            (9999, 3, (500, 1)),
        ],
    )
    def test_the_longest_side_is_500_and_the_other_rounded_down(self, width, height, expected):
        encoded = encode_image(saved(np.zeros((height, width, 3), np.uint8), "PNG"), EncodeOptions())
        assert (encoded.width, encoded.height) == expected
        assert Image.open(io.BytesIO(encoded.data)).size == expected

    def test_jpegs_are_420_and_of_the_stated_quality(self):
        pixels = picture(120, 200)
        image = Image.open(io.BytesIO(encode_image(saved(pixels, "PNG"), EncodeOptions()).data))
        reference = Image.open(io.BytesIO(jpeg(pixels, quality=90, subsampling="4:2:0")))
        assert image.quantization == reference.quantization
        assert image.layer == reference.layer, "sampling factors"
        low = Image.open(io.BytesIO(encode_image(saved(pixels, "PNG"), EncodeOptions(quality=30)).data))
        assert low.quantization == Image.open(io.BytesIO(jpeg(pixels, quality=30))).quantization

    def test_a_jpeg_is_decoded_as_pillow_does_bit_for_bit(self):
        rng = np.random.default_rng(0)
        for size, options in (
            ((37, 53), {}),
            ((64, 80), {"subsampling": "4:4:4"}),
            ((9, 200), {"progressive": True}),
        ):
            data = jpeg(rng.integers(0, 256, (*size, 3), dtype=np.uint8), **options)
            raw = encode_image(data, EncodeOptions(encode="raw", max_side=0))
            assert raw.data == np.asarray(Image.open(io.BytesIO(data))).tobytes()

    def test_options_out_of_range_are_refused(self):
        with pytest.raises(ValueError, match="`quality` must be 1 to 100, got 0"):
            EncodeOptions(quality=0)
        with pytest.raises(ValueError, match=r"`max_side` must be 0 \(no limit\) to 65535, got -1"):
            EncodeOptions(max_side=-1)
        with pytest.raises(ValueError, match=r"`encode` must be one of .*, got 'png'"):
            EncodeOptions(encode="png")


class TestFiles:
    @pytest.mark.parametrize("encode", ["jpeg", "keep", "raw"])
    def test_the_bytes_do_not_depend_on_the_workers(self, ugly_folder, tmp_path, encode):
        for workers in (1, 3):
            folder = tmp_path / str(workers)
            folder.mkdir()
            convert(ugly_folder, folder / "x.beton", EncodeOptions(encode=encode), workers=workers)
        for suffix in ("", ".json", ".quarantine.jsonl"):
            one, three = ((tmp_path / w / f"x.beton{suffix}").read_bytes() for w in ("1", "3"))
            assert one == three

    def test_a_flat_folder_gives_no_labels(self, tmp_path):
        files = {f"{i}.png": saved(picture(8 + i), "PNG") for i in range(3)}
        manifest = convert(
            write_folder(tmp_path / "flat", files),
            tmp_path / "x.beton",
            EncodeOptions(encode="raw"),
            workers=2,
        )
        beton = open_beton(tmp_path / "x.beton")
        assert beton.labels is manifest.classes is manifest.class_counts is None
        assert beton.heights.tolist() == [8, 9, 10]
        assert all(np.array_equal(decoded(beton, i), picture(8 + i)) for i in range(3))

    def test_the_manifest_tells_what_was_made_of_what(self, tmp_path):
        import hashlib
        import zlib

        files = photos()
        dest = tmp_path / "x.beton"
        convert(write_folder(tmp_path / "source", files), dest, EncodeOptions(encode="keep"), workers=2)
        manifest = load_manifest(dest)
        assert manifest.files == sorted(files)
        assert manifest.crc32 == [zlib.crc32(files[name]) for name in sorted(files)]
        assert manifest.sha256 == hashlib.sha256(dest.read_bytes()).hexdigest()
        assert (manifest.num_samples, manifest.num_bytes) == (6, dest.stat().st_size)
        assert (manifest.classes, manifest.class_counts) == (["class0", "class1"], [3, 3])
        assert manifest.options == {"encode": "keep", "max_side": 500, "quality": 90, "page_size": 1 << 23}
        assert (manifest.quarantined, manifest.num_converted) == ([], 0)
        assert str(tmp_path) not in (tmp_path / "x.beton.json").read_text()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "x.beton", "x.beton.json"]

    def test_names_in_any_encoding(self, tmp_path):
        root = write_folder(tmp_path / "source", {"Zoë 猫/a\nb.png": saved(picture(), "PNG")})
        odd = os.fsencode(root) + b"/Zo\xc3\xab \xe7\x8c\xab/\xff.png"
        with open(odd, "wb") as file:  # noqa: PTH123 — a name that is no Unicode
            file.write(saved(picture(), "PNG"))
        with open(odd[:-5] + b"\xfe.png", "wb"):  # noqa: PTH123
            pass
        manifest = convert(root, tmp_path / "x.beton", EncodeOptions(), workers=1)
        assert load_manifest(tmp_path / "x.beton") == manifest
        assert manifest.files == ["Zoë 猫/a\nb.png", "Zoë 猫/\udcff.png"]
        assert [entry.file for entry in manifest.quarantined] == ["Zoë 猫/\udcfe.png"]

    def test_an_existing_file_is_replaced_only_by_force(self, tmp_path):
        root, dest = write_folder(tmp_path / "source", photos()), tmp_path / "x.beton"
        for occupied in (dest, tmp_path / "x.beton.json"):
            occupied.write_bytes(b"precious")
            with pytest.raises(ValueError, match=r"exists; pass --force to replace it"):
                convert(root, dest, EncodeOptions(), workers=1)
            assert occupied.read_bytes() == b"precious"
            occupied.unlink()
        dest.write_bytes(b"precious")
        quarantine_path(dest).write_bytes(b"an older list")
        convert(root, dest, EncodeOptions(), workers=1, force=True)
        assert open_beton(dest).num_samples == 6
        assert not quarantine_path(dest).exists(), "no file was left out this time"

    def test_a_failed_replacement_leaves_the_old_file(self, tmp_path, monkeypatch):
        root, dest = write_folder(tmp_path / "source", photos()), tmp_path / "x.beton"
        convert(root, dest, EncodeOptions(), workers=1)
        before = {path: path.read_bytes() for path in tmp_path.glob("x*")}

        def full_disk(writer):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(convert_output.BetonWriter, "finish", full_disk)
            with pytest.raises(OSError, match="No space left on device, after 6 of 6 files; what was done is kept"):
                convert(root, dest, EncodeOptions(encode="raw"), workers=1, force=True)
        assert {path: path.read_bytes() for path in before} == before
        left = {tmp_path / f"x.beton.{suffix}" for suffix in ("journal", "partial")}
        assert {*tmp_path.glob("x*")} == {*before, *left}
        convert(root, dest, EncodeOptions(encode="raw"), workers=1, force=True)
        assert {*tmp_path.glob("x*")} == {*before}
        assert set(open_beton(dest).modes.tolist()) == {MODE_RAW}

    def test_bad_destinations_are_refused_before_any_work(self, tmp_path):
        root = write_folder(tmp_path / "source", photos())
        (tmp_path / "folder.beton").mkdir()
        for dest, expected in [
            (tmp_path / "x.ffcv", "must be named *.beton"),
            (tmp_path / "no" / "x.beton", "folder"),
            (root / "x.beton", "inside the source folder"),
            (root / "class0" / "x.beton", "inside the source folder"),
            (tmp_path / "folder.beton", "is a folder"),
        ]:
            with pytest.raises(ValueError) as caught:
                convert(root, dest, EncodeOptions(), workers=1)
            assert expected in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.beton", "source"]
        with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
            convert(root, tmp_path / "x.beton", EncodeOptions(), workers=0)

    def test_a_disk_too_small_is_refused_with_numbers(self, tmp_path, monkeypatch):
        """8.4 MB are reserved for the tables and as many for the first page of data: 16.8 MB, and a tenth more."""
        root = write_folder(tmp_path / "source", photos())
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 18_000_000))
        with pytest.raises(ValueError, match=r"needs about 16\.8 MB and a margin of 10%, but only 18\.0 MB are free"):
            convert(root, tmp_path / "x.beton", EncodeOptions(), workers=1)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 19_000_000))
        convert(root, tmp_path / "x.beton", EncodeOptions(), workers=1)


class TestCommand:
    def test_files_that_keep_could_not_keep_are_counted(self, tmp_path):
        root = write_folder(tmp_path / "source", {"a.jpg": jpeg(picture()), "b.png": saved(picture(), "PNG")})
        done = run_convert(root, tmp_path / "x.beton", "--encode", "keep")
        assert done.stdout.endswith(" images/s; 1 could not be kept and were converted; quarantined 0\n")

    def test_it_says_what_it_did(self, tmp_path):
        root, dest = write_folder(tmp_path / "source", photos()), tmp_path / "x.beton"
        done = run_convert(root, dest, "--encode", "raw", "--workers", "2", "--page-size", str(1 << 21))
        assert (done.returncode, done.stdout.count("\n")) == (0, 1)
        assert done.stdout.startswith(f"{dest}: 6 images, 2 classes, 4.2 MB, ")
        assert done.stdout.endswith(" images/s; quarantined 0\n")
        assert "6 files, about " in done.stderr
        again = run_convert(root, dest)
        assert again.returncode == 2
        assert again.stderr == f"error: {dest} exists; pass --force to replace it, or choose another name\n"

    @pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_stopped_midway_it_keeps_what_was_done_and_the_old_file(self, tmp_path, stop, code):
        """A 12-megapixel photo under many names keeps one worker busy; it is stopped while writing."""
        root, dest = (
            write_folder(tmp_path / "source", {"0.jpg": jpeg(picture(3000, 4000))}),
            tmp_path / "x.beton",
        )
        for i in range(1, 2000):
            (root / f"{i}.jpg").hardlink_to(root / "0.jpg")
        dest.write_bytes(b"the older one")
        command = [
            sys.executable,
            "-m",
            "tools.convert",
            root,
            dest,
            "--workers",
            "1",
            "--encode",
            "raw",
            "--force",
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            partial = tmp_path / "x.beton.partial"
            deadline = time.monotonic() + 200
            while not partial.exists() or partial.stat().st_size < 9 << 20:
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(stop)
            assert process.wait() == code
            *_, told = process.stderr.read().splitlines()
            num_done = int(re.fullmatch(r"stopped after (\d+) of 2000 files; the same command goes on", told)[1])
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
        left = ["source", "x.beton", "x.beton.journal", "x.beton.partial"]
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        assert dest.read_bytes() == b"the older one"
        with open_journal(tmp_path / "x.beton.journal") as journal:
            assert read_progress(journal).next_index == num_done > 0
