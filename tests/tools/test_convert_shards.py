"""A set in shards is the one file cut into pieces: the same rows, the same encoded bytes, in the same order."""

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest
from tests.tools.ugly_images import picture, saved
from tools.convert import convert_images, quarantine_path
from tools.convert_places import Places, check_names, size_in_bytes
from tools.image_encoding import EncodeOptions
from tools.verify import verify
from tools.whole_file import locked_file, partial_path

PAGE = 1 << 21
SHARD = 4 * PAGE  # a page of tables and two of data; the table at the end breaks a third: four 900 kB images
RAW = EncodeOptions(encode="raw", max_side=0)
SIZE = (500, 600)  # H, W


def make_source(root):
    """Class a: eight images, one broken; class b: four, and two broken ones at the end; a stray."""
    for folder in ("a", "b"):
        (root / folder).mkdir(parents=True)
    for i in range(12):
        pixels = np.roll(picture(*SIZE), 7 * i, axis=1)
        (root / "ab"[i // 8] / f"{i:02}.png").write_bytes(saved(pixels, "PNG", compress_level=1))
    for name in ("a/03b.png", "b/98.png", "b/99.png"):
        (root / name).write_bytes(b"broken")
    (root / "stray.txt").write_bytes(b"beside")
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("images"))


def shards(source, folder, *, workers=2, dirs=(), options=RAW, **more):
    folder.mkdir(exist_ok=True)
    places = Places(dest=folder / "x.shards.json", shard_size=SHARD, shard_dirs=tuple(dirs), page_size=PAGE)
    return convert_images(source, places, options, workers=workers, **more)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """(folder with one.beton and x.shards.json, what converting to shards returned)."""
    folder = tmp_path_factory.mktemp("made")
    convert_images(source, Places(dest=folder / "one.beton", page_size=PAGE), RAW, workers=2)
    return folder, shards(source, folder)


@pytest.fixture
def mine(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "mine")
    return tmp_path / "mine"


def problems(path, images=None):
    return list(verify(path, images, workers=2))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("x")}


def test_rows_and_bytes_are_those_of_one_file(made):
    folder, told = made
    one, joined = open_beton(folder / "one.beton"), open_beton(folder / "x.shards.json")
    assert joined.labels.tolist() == one.labels.tolist() == [0] * 8 + [1] * 4
    for row in range(12):
        assert np.array_equal(joined.encoded(row), one.encoded(row))
    whole, joint = load_manifest(folder / "one.beton"), load_manifest(folder / "x.shards.json")
    for name in ("files", "crc32", "classes", "class_counts", "quarantined", "options", "tools", "num_converted"):
        assert getattr(joint, name) == getattr(whole, name), name
    listed = quarantine_path(folder / "x.shards.json").read_bytes()
    assert listed == quarantine_path(folder / "one.beton").read_bytes()
    assert (told.num_samples, told.num_shards, told.num_quarantined) == (12, 3, 4)
    assert (told.classes, told.class_counts) == (["a", "b"], [8, 4])


def test_the_index_says_what_the_contract_says(made):
    folder, _ = made
    index = json.loads((folder / "x.shards.json").read_text())
    entries = index.pop("shards")
    assert index == {
        "format": "twinview-shards",
        "format_version": 1,
        "num_samples": 12,
        "classes": ["a", "b"],
        "class_counts": [8, 4],
        "options": {"encode": "raw", "max_side": 0, "quality": 90, "page_size": PAGE},
        "quarantined": 4,
    }
    assert [(entry["path"], entry["num_samples"]) for entry in entries] == [(f"x-{i:05d}.beton", 4) for i in range(3)]
    for entry in entries:
        data = (folder / entry["path"]).read_bytes()
        assert entry["num_bytes"] == len(data) <= SHARD
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_each_shard_lists_what_was_left_out_of_it(made):
    folder, _ = made
    manifests = [load_manifest(folder / f"x-{i:05d}.beton") for i in range(3)]
    assert [[entry.file for entry in manifest.quarantined] for manifest in manifests] == [
        ["stray.txt", "a/03b.png"],
        [],
        ["b/98.png", "b/99.png"],
    ]
    assert [manifest.class_counts for manifest in manifests] == [[4, 0], [4, 0], [0, 4]]


def test_the_workers_decide_nothing(source, made, tmp_path):
    shards(source, tmp_path / "other", workers=1)
    assert files(tmp_path / "other") == files(made[0])


class TestPlaces:
    @pytest.fixture
    def room(self, monkeypatch):
        """Sets how many bytes are free in a folder, by its name; all else has plenty."""
        free = {}
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free.get(Path(path).name, 10**12)))
        return free

    def test_folders_are_filled_in_order(self, source, made, tmp_path, monkeypatch):
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        second.mkdir()
        usage = namedtuple("usage", "total used free")

        def disk_usage(path):
            """`first` holds one shard and a little more."""
            taken = sum(file.stat().st_size for file in Path(path).iterdir())
            return usage(0, 0, (12 * 10**6 if Path(path) == first else 10**12) - taken)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        shards(source, tmp_path / "index", dirs=(first, second))
        index = json.loads((tmp_path / "index" / "x.shards.json").read_text())
        places = [str(first / "x-00000.beton"), str(second / "x-00001.beton"), str(second / "x-00002.beton")]
        assert [entry["path"] for entry in index["shards"]] == places
        assert (second / "x-00001.beton").read_bytes() == (made[0] / "x-00001.beton").read_bytes()
        assert problems(tmp_path / "index" / "x.shards.json", source) == []

    def test_below_the_index_they_are_named_from_there(self, source, tmp_path):
        (tmp_path / "set" / "parts").mkdir(parents=True)
        shards(source, tmp_path / "set", dirs=[tmp_path / "set" / "parts"])
        index = json.loads((tmp_path / "set" / "x.shards.json").read_text())
        assert index["shards"][0]["path"] == "parts/x-00000.beton"
        shutil.move(tmp_path / "set", tmp_path / "moved")
        assert problems(tmp_path / "moved" / "x.shards.json") == []

    def test_too_little_room_is_refused_with_the_folders(self, source, tmp_path, room):
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            room[name] = 9_000_000
        with pytest.raises(ValueError, match=r"needs about .* but only 9\.0 MB are free in .*one; 9\.0 MB are free in"):
            shards(source, tmp_path / "index", dirs=[tmp_path / "one", tmp_path / "two"])
        assert list((tmp_path / "index").iterdir()) == []

    def test_what_cannot_be_asked_for(self, source, tmp_path):
        for wanted, message in (
            ({"dest": tmp_path / "x.shards.json"}, "say --shard-size as well"),
            ({"dest": tmp_path / "x.beton", "shard_size": SHARD}, r"must be named \*\.shards\.json"),
            ({"dest": tmp_path / "x.beton", "shard_dirs": (tmp_path,)}, "say --shard-size as well"),
            ({"dest": tmp_path / "x.shards.json", "shard_size": SHARD}, "must be at least 4 pages of 8.4 MB, 33.6 MB"),
        ):
            with pytest.raises(ValueError, match=message):
                Places(**wanted)
        with pytest.raises(ValueError, match="none does not exist; create it"):
            shards(source, tmp_path / "index", dirs=[tmp_path / "none"])

    def test_old_shards_are_replaced_only_by_force(self, source, made, tmp_path):
        (tmp_path / "x-00007.beton").write_bytes(b"precious")
        with pytest.raises(ValueError, match=r"x-00007\.beton exists; pass --force"):
            shards(source, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["x-00007.beton"]
        (tmp_path / "x-00007.beton").rename(tmp_path / "x-00001.beton")
        shards(source, tmp_path, force=True)
        assert files(tmp_path) == files(made[0])

    @pytest.mark.parametrize(
        ("text", "expected"), [("20GB", 20 * 10**9), ("1.5 MiB", 3 << 19), ("4e9", 4 * 10**9), ("70000", 70000)]
    )
    def test_sizes(self, text, expected):
        assert size_in_bytes(text) == expected

    def test_a_size_that_is_none(self):
        with pytest.raises(ValueError, match="must be a number of bytes, such as 20GB or 512MiB, got 'big'"):
            size_in_bytes("big")


class TestVerify:
    def test_a_good_set_is_proved(self, made, source):
        assert problems(made[0] / "x.shards.json", source) == []

    def test_damage_is_named_by_shard(self, mine):
        path = mine / "x-00001.beton"
        offset = int(open_beton(path).offsets[2])
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x11\x22\x33")
        found = problems(mine / "x.shards.json")
        assert len(found) == 2
        assert found[0].startswith(f"{path}: the file's sha256 is ")
        assert found[1].startswith(f"{path}: sample 2 ('a/06.png'): its crc32 is ")

    def test_a_shard_that_is_gone_or_another(self, mine):
        index = mine / "x.shards.json"
        (mine / "x-00002.beton").rename(mine / "moved.beton")
        assert problems(index) == [
            f"{mine / 'x-00002.beton'}: no such file; if the shard was moved, write its new place into {index}"
        ]
        for suffix in ("", ".json"):
            shutil.copy(mine / f"x-00000.beton{suffix}", mine / f"x-00002.beton{suffix}")
        found = problems(index)
        assert any("x-00002.beton: its sha256 is " in line and line.endswith("it is another file") for line in found)
        assert "the classes have [12, 0] samples, by the index [8, 4]" in found

    def test_files_that_came_or_went(self, mine, source):
        images = shutil.copytree(source, mine / "images")
        (images / "b" / "11.png").rename(images / "b" / "12.png")
        assert problems(mine / "x.shards.json", images) == [
            "'b/12.png' is among the images, but not in the manifest",
            "'b/11.png' is in the manifest, but not among the images",
        ]


def test_a_shard_that_another_conversion_writes_is_not_touched(source, tmp_path):
    common = tmp_path / "common"
    common.mkdir()
    with locked_file(partial_path(common / "x-00000.beton")) as file:
        file.write(b"of the first")
        file.flush()
        with pytest.raises(ValueError, match="is being written by another process"):
            shards(source, tmp_path / "second", dirs=[common])
        assert file.seek(0) == 0
        assert file.read() == b"of the first"


def test_a_shard_that_another_conversion_finished_meanwhile_is_not_replaced(source, tmp_path, monkeypatch):
    def meanwhile(places, *, fresh):
        check_names(places, fresh=fresh)
        (tmp_path / "common" / "x-00000.beton").write_bytes(b"of the first")

    (tmp_path / "common").mkdir()
    monkeypatch.setattr("tools.convert_images.check_names", meanwhile)
    with pytest.raises(ValueError, match=r"x-00000\.beton exists"):
        shards(source, tmp_path / "second", dirs=[tmp_path / "common"])
    assert files(tmp_path / "common") == {"x-00000.beton": b"of the first"}
