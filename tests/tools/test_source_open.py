import argparse
import sys

import pytest

from pipelines.manifest import _OUTSIDE
from tests.tools.source_files import photos, refusal, rows
from tools.image_source import SourceOptions, add_source_arguments, open_source, source_options
from tools.source_recognition import recognise
from tools.source_rows import number_labels, safe_name
from train.cli import UnfitEnvironment


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos(1)[0][0])
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/1.jpg", "b/2.jpg"], "folder"),
        (["1.jpg"], "folder"),
        (["1.jpg", "old.tar", "table.parquet"], "folder"),
        (["a/1.jpg", "b/1.jpg", "backup.tar"], "folder"),
        (["a/1.jpg", "table.parquet"], "folder"),
        (["000.tar", "001.tar", "sizes.json"], "webdataset"),
        (["x.parquet"], "parquet"),
        (["README.md", "data/train-00000-of-00001.parquet"], "parquet"),
        (["dataset_info.json", "state.json", "data-00000-of-00001.arrow"], "huggingface"),
        (["dataset_dict.json", "train/state.json"], "huggingface"),
        (["cifar-10-batches-py/test_batch"], "cifar"),
        (["cifar-100-python.tar.gz"], "cifar"),
        (["stl10_binary/train_X.bin", "stl10_binary.tar.gz"], "stl"),
    ],
)
def test_folders_are_recognised(tmp_path, names, expected):
    assert recognise(touch(tmp_path, *names)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar-10-python.tar.gz", "cifar"),
        ("stl10_binary.tar.gz", "stl"),
        ("a.tar", "webdataset"),
        ("a.TAR.GZ", "webdataset"),
        ("a.parquet", "parquet"),
        ("a.csv", "list"),
        ("a.TSV", "list"),
        ("a.jsonl", "list"),
    ],
)
def test_files_are_recognised(tmp_path, name, expected):
    touch(tmp_path, name)
    assert recognise(tmp_path / name) == expected


def test_what_is_not_there_or_not_known(tmp_path):
    touch(tmp_path, "a.jpg")
    assert f"found none at {tmp_path / 'x'}" in refusal(tmp_path / "x")
    assert f"found a file at {tmp_path / 'a.jpg'}; if it is one of them, say so with --format" in refusal(
        tmp_path / "a.jpg"
    )
    assert recognise(tmp_path / "{000..003}.tar") == "webdataset"


def test_a_folder_at_any_depth_without_labels(tmp_path):
    root = touch(tmp_path / "phone", "z.jpg", "2024/May/1.heic", "2024/b.jpg", "2024/.thumbs/1.jpg", "a/b/c/d/1.png")
    (root / "2024" / "MVI.mov").write_bytes(b"x")
    source = open_source(root, SourceOptions(unlabelled=True))
    assert source.names == ["z.jpg", "2024/MVI.mov", "2024/b.jpg", "2024/May/1.heic", "a/b/c/d/1.png"]
    assert source.labels is source.classes is None
    assert not source.strays
    assert "found both (folder '2024', image 'z.jpg'); pass --unlabelled to take all of them" in refusal(root)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold images at some depth, found 0 other files" in refusal(empty, SourceOptions(unlabelled=True))


def test_a_folder_of_classes(tmp_path):
    root = tmp_path / "set"
    for i, (data, label) in enumerate(photos()):
        (root / "abc"[label]).mkdir(parents=True, exist_ok=True)
        (root / "abc"[label] / f"{i}.jpg").write_bytes(data)
    (root / "notes.txt").touch()
    source = open_source(root, SourceOptions())
    assert rows(source) == sorted(photos(), key=lambda photo: photo[1])
    assert source.classes == ["a", "b", "c"]
    assert [(stray.file, stray.reason) for stray in source.strays] == [("notes.txt", "lies outside the class folders")]
    before = source.identity()
    (root / "a" / "1.jpg").write_bytes(b"other bytes")
    assert open_source(root, SourceOptions()).identity() != before


def test_options_that_mean_nothing_are_refused(tmp_path):
    touch(tmp_path, "a/1.jpg")
    assert "--split means nothing for" in refusal(tmp_path, SourceOptions(split="train"))
    assert "is read as folder; leave it out, or set --format" in refusal(tmp_path, SourceOptions(image_column="x"))
    with pytest.raises(ValueError, match="`format` must be one of"):
        SourceOptions(format="zip")
    with pytest.raises(ValueError, match="`unlabelled` excludes `label_column`, got 'x'; leave one out"):
        SourceOptions(unlabelled=True, label_column="x")


def test_the_command_line():
    parser = argparse.ArgumentParser()
    add_source_arguments(parser)
    assert source_options(parser.parse_args([])) == SourceOptions()
    args = ["--format", "parquet", "--image-column", "img", "--label-column", "y", "--split", "train"]
    expected = SourceOptions(format="parquet", image_column="img", label_column="y", split="train")
    assert source_options(parser.parse_args(args)) == expected
    assert source_options(parser.parse_args(["--unlabelled"])).unlabelled


@pytest.mark.parametrize(("format", "package"), [("parquet", "pyarrow"), ("huggingface", "datasets")])
def test_a_missing_package_is_one_line(tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    touch(tmp_path, "x.parquet")
    with pytest.raises(
        UnfitEnvironment, match=rf"needs the package {package}; pip install -r requirements-formats\.txt"
    ):
        open_source(tmp_path, SourceOptions(format=format))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../../x", "a//b", "./a", "a/./b", "", "/", "..", "a\\..\\b", "C:\\x", "a\0b", "ok/name.jpg"],
)
def test_names_can_stand_in_a_manifest(name):
    assert not _OUTSIDE.search(safe_name(name))
    assert safe_name(safe_name(name)) == safe_name(name)


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        ([2, 0], None, ([2, 0], ["0", "1", "2"])),
        (["2", "10"], None, ([2, 10], [str(i) for i in range(11)])),
        (["02", "10"], None, ([0, 1], ["02", "10"])),
        ([7, "a"], None, ([0, 1], ["7", "a"])),
        ([-1, 1], None, ([0, 1], ["-1", "1"])),
        ([-1, 1], ["x", "y"], ([None, 1], ["x", "y"])),
        ([None, -1], None, ([None, None], None)),
        (["-1"], None, ([None], None)),
        (["b", None, "a"], None, ([1, None, 0], ["a", "b"])),
        ([100_000, 3], None, ([1, 0], ["3", "100000"])),
        ([], ["x"], ([], None)),
    ],
)
def test_labels_are_numbered(values, classes, expected):
    assert number_labels(values, classes) == expected


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(ValueError, match="labels must be 0 to 1 for its 2 classes, found 2"):
        number_labels([0, 2], ["a", "b"])
    with pytest.raises(ValueError, match="found -2"):
        number_labels([0, -2], ["a", "b"])
