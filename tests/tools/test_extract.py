"""Features to a file: those of the network itself, with names and labels, in both formats; bad input in a line."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.manifest import load_manifest, manifest_path
from tests.train.evaluated import make_sets, save_run
from tools.extract import ExtractConfig, extract, parse_extract
from train.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from train.evaluation.features import features_of
from train.evaluation.protocol import EvaluationConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    make_sets(folder)
    save_run(folder / "run")
    return folder


def config(root, out, **options):
    data = str(root / "test" / "set.beton")
    return ExtractConfig(**{"checkpoint": str(root / "run"), "data": data, "out": str(out), "device": "cpu", **options})


@pytest.mark.parametrize("layers", [0, -1])
def test_the_file_holds_what_evaluations_use(root, tmp_path, layers):
    extract(config(root, tmp_path / "features.npz", head_layers=layers, cache=False))
    manifest = load_manifest(root / "test" / "set.beton")
    data = {split: str(root / split / "set.beton") for split in ("train", "test")}
    theirs = features_of(
        EvaluationConfig(
            checkpoint=str(root / "run"),
            train_data=data["train"],
            test_data=data["test"],
            device="cpu",
            head_layers=layers,
            cache=False,
        ),
        "test",
    )
    with np.load(tmp_path / "features.npz") as file:
        assert file["features"].dtype == np.float32
        assert np.array_equal(file["features"], theirs.values.numpy())
        assert file["labels"].tolist() == theirs.labels.tolist()
        assert file["names"].tolist() == manifest.files
        assert file["classes"].tolist() == manifest.classes


def test_parquet_says_the_same(root, tmp_path):
    ours = extract(config(root, tmp_path / "features.parquet"))
    table = pq.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["name", "label", "features"]
    assert table["name"].to_pylist() == ours.names
    assert table["label"].to_pylist() == ours.labels.tolist()
    assert np.array_equal(np.array(table["features"].to_pylist(), np.float32), ours.features)
    assert json.loads(table.schema.metadata[b"classes"]) == ours.classes


def test_images_without_labels_or_manifest(root, tmp_path):
    """A folder of loose images: names are theirs, labels −1; a `.beton` that nothing is known of: rows."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, path in enumerate(sorted((root / "test" / "images").rglob("*.png"))[:3]):
        shutil.copy(path, photos / f"photo {i}.png")
    ours = extract(config(root, tmp_path / "features.npz", data=str(photos)))
    assert ours.names == ["photo 0.png", "photo 1.png", "photo 2.png"]
    assert ours.labels.tolist() == [-1, -1, -1]
    assert ours.classes == []
    bare = tmp_path / "bare.beton"
    shutil.copy(root / "test" / "set.beton", bare)
    assert not manifest_path(bare).exists()
    assert extract(config(root, tmp_path / "bare.npz", data=str(bare))).names[:2] == ["0", "1"]


def test_features_that_are_not_finite_are_refused_and_nothing_is_written(root, tmp_path):
    broken = tmp_path / "run"
    path = checkpoint_path(broken, 4)
    save_run(broken)
    checkpoint = load_checkpoint(path)
    next(value for value in checkpoint.model.values() if value.is_floating_point()).fill_(float("nan"))
    save_checkpoint(path, checkpoint)
    with pytest.raises(ValueError, match=r"the features must be finite, got NaN or infinity in \d+ of \d+ samples"):
        extract(config(root, tmp_path / "features.npz", checkpoint=str(broken)))
    assert not list(tmp_path.glob("features*"))


def test_names_that_are_no_text(root, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(next((root / "test" / "images").rglob("*.png")), os.fsencode(photos) + b"/\xff.png")
    ours = extract(config(root, tmp_path / "features.parquet", data=str(photos)))
    assert ours.names == [os.fsdecode(b"\xff.png")]
    assert pq.read_table(tmp_path / "features.parquet")["name"].to_pylist() == ["\\udcff.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "features.csv"}, r"`out` must end in \.npz or \.parquet, got features\.csv"),
        ({"out": "nowhere/features.npz"}, "the folder of `out` must exist, nowhere does not"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"head_layers": -2}, "`head_layers` must be −1"),
    ],
)
def test_bad_input(root, options, message):
    with pytest.raises(ValueError, match=message):
        config(root, options.pop("out", "features.npz"), **options)


def test_the_command_line():
    words = ["--checkpoint", "runs/a", "--data", "b.beton", "--out", "c.npz", "--head_layers", "-1"]
    assert parse_extract(words) == ExtractConfig(checkpoint="runs/a", data="b.beton", out="c.npz", head_layers=-1)
    with pytest.raises(ValueError, match="did you mean `data`"):
        parse_extract(["--checkpoint", "a", "--dat", "b", "--out", "c.npz"])
