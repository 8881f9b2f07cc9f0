"""Sets in shards: the same rows, views and names as the one file that they could have been; damage by name."""

import gc
import hashlib
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import BetonError, open_beton
from pipelines.build import DataConfig, build_loader, open_data
from pipelines.manifest import ManifestError, load_manifest, manifest_path
from pipelines.plan import beton_fingerprint
from tests.pipelines.betons import make_beton
from tools.beton_writer import BetonWriter
from tools.image_encoding import EncodedImage

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
CUTS = (0, 5, 6, 24)  # three shards, one of a single sample


def write_shards(whole, folder):
    """The rows of a `.beton` in shards with manifests, the last in a folder of its own, and their index."""
    manifest, entries = load_manifest(whole.path), []
    for i, (begin, end) in enumerate(itertools.pairwise(CUTS)):
        path = folder / ("other" if end == CUTS[-1] else ".") / f"set-{i:05d}.beton"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb+") as file:
            writer = BetonWriter(file, capacity=end - begin, labelled=True)
            for row in range(begin, end):
                fields = {"mode": int(whole.modes[row]), "width": int(whole.widths[row])}
                fields |= {"height": int(whole.heights[row]), "data": whole.encoded(row).tobytes()}
                names = {field for field in EncodedImage.__dataclass_fields__ if field not in fields}
                rest = {"crc32": manifest.crc32[row], "kept": False}
                writer.add(EncodedImage(**fields, **{name: rest[name] for name in names}), int(whole.labels[row]))
            writer.finish()
        data = path.read_bytes()
        entry = {"num_bytes": len(data), "num_samples": end - begin, "sha256": hashlib.sha256(data).hexdigest()}
        counts = np.bincount(whole.labels[begin:end], minlength=2).tolist()
        part = {"files": manifest.files[begin:end], "crc32": manifest.crc32[begin:end], "class_counts": counts}
        manifest_path(path).write_text(replace(manifest, **entry, **part).to_json())
        entries.append({"path": str(path.relative_to(folder)), **entry})
    index = folder / "set.shards.json"
    content = {"format": "twinview-shards", "format_version": 1, "num_samples": CUTS[-1], "shards": entries}
    index.write_text(json.dumps(content))
    return index


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("whole"), SIZES)


@pytest.fixture
def index(whole, tmp_path):
    return write_shards(whole, tmp_path)


def refusal(path):
    with pytest.raises(BetonError) as caught:
        open_beton(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(index, **changes):
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def test_the_rows_are_those_of_one_file(whole, index):
    shards = open_beton(index)
    assert shards.num_samples == whole.num_samples
    for name in ("modes", "widths", "heights", "sizes", "labels"):
        assert getattr(shards, name).tolist() == getattr(whole, name).tolist()
    assert [shards.encoded(i).tobytes() for i in range(24)] == [whole.encoded(i).tobytes() for i in range(24)]
    assert beton_fingerprint(shards) == beton_fingerprint(whole)  # a run may go on with the one or the other
    for array in (shards.data, shards.offsets, shards.labels, shards.widths):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("loader", ["ffcv", "dali", "resident"])
def test_every_loader_gives_the_batches_of_one_file(whole, index, loader):
    batches = []
    for path in (whole.path, index):
        config = DataConfig(path=str(path), loader=loader, global_batch_size=8, num_threads=2)
        made = build_loader(
            config,
            open_data(config),
            build_recipe(AugmentConfig(size=32)),
            seed=3,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            dtype=torch.float32,
            num_cores=2,
        )
        batches.append(list(made.epoch(1)))
        made.close()
    for ours, theirs in zip(*batches, strict=True):
        assert ours.sample_indices.tolist() == theirs.sample_indices.tolist()
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert all(torch.equal(a, b) for a, b in zip(ours.views, theirs.views, strict=True))


def test_the_manifests_are_read_as_one(whole, index):
    one, joined = load_manifest(whole.path), load_manifest(index)
    for name in ("num_samples", "classes", "class_counts", "files", "crc32", "options", "tools"):
        assert getattr(joined, name) == getattr(one, name)
    digests = [hashlib.sha256(stamp.path.read_bytes()).hexdigest() for stamp in open_beton(index).stamps]
    assert joined.sha256 == hashlib.sha256("".join(digests).encode()).hexdigest()
    manifest_path(index.parent / "set-00001.beton").unlink()
    assert load_manifest(index) is None


def test_a_manifest_of_another_shard_is_refused(index):
    first, second = (manifest_path(index.parent / f"set-0000{i}.beton") for i in range(2))
    content = json.loads(second.read_text())
    second.write_text(json.dumps(content | {"classes": ["other", "names"]}))
    with pytest.raises(ManifestError, match=r"set-00001\.beton\.json: describes another file, or other classes"):
        load_manifest(index)
    assert first.exists()


def test_no_file_stays_open_and_the_map_ends_with_the_set(index):
    def mapped():
        return sum("set-0000" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = len(list(Path("/proc/self/fd").iterdir()))
    shards = open_beton(index)
    first = shards.encoded(0)
    assert (len(list(Path("/proc/self/fd").iterdir())), mapped()) == (before, 3)
    text = first.tobytes()
    del shards
    gc.collect()
    assert first.tobytes() == text  # a view holds the map
    del first
    gc.collect()
    assert mapped() == 0


def test_a_shard_that_changes_is_named(index):
    shards = open_beton(index)
    shards.check_unchanged()
    os.utime(shards.stamps[1].path, ns=(0, 0))
    with pytest.raises(BetonError, match=r"set-00001\.beton: changed while it was being read \(in its place\)"):
        shards.check_unchanged()


def test_a_shard_that_is_gone_or_another_is_named(index):
    shard = index.parent / "set-00001.beton"
    shard.rename(index.parent / "moved.beton")
    assert "if it was moved, write its new place into the index" in refusal(index)
    entries = json.loads(index.read_text())["shards"]
    entries[1]["path"] = str(index.parent / "moved.beton")  # absolute
    edit(index, shards=entries)
    assert open_beton(index).num_samples == 24
    entries[0], entries[1] = entries[0] | {"path": entries[1]["path"]}, entries[1]
    edit(index, shards=entries)
    assert "not" in refusal(index)
    assert "it is another file" in refusal(index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "expected an index of format 'twinview-shards', found another file"),
        ({"format_version": 2}, "expected index version 1, found 2"),
        ({"shards": []}, "expected a list of shards, found none"),
        ({"shards": [5]}, "shard 0 must have a path, found None"),
        ({"shards": [{"path": "a\0"}]}, "shard 0 must have a path"),
        ({"shards": [{"path": "a", "sha256": "x"}]}, "shard 0 must have a sha256, found 'x'"),
        ({"shards": [{"path": "a", "sha256": "0" * 64, "num_bytes": 1, "num_samples": 5}]}, "cannot have 5 samples"),
        ({"num_samples": 25}, "its shards have 24 samples, it says 25"),
    ],
)
def test_an_index_that_cannot_be_is_refused(index, changes, message):
    edit(index, **changes)
    assert message in refusal(index)


def test_a_torn_index_and_none_at_all(index):
    index.write_text(index.read_text()[:-5])
    assert "found a torn or foreign file" in refusal(index)
    index.unlink()
    assert "no such file" in refusal(index)
