"""Labelled sets that cannot be evaluated: one line with split, class, what was found and what would do."""

import numpy as np
import pytest
import torch

from tests.pipelines.betons import make_beton
from train.evaluation import checks
from train.evaluation.checks import check_finite, check_labelled, check_splits
from train.evaluation.labelled_data import LabelledData, open_labelled


def data(split, labels, classes=None):
    labels = np.array(labels)
    return LabelledData(split=split, path=f"{split}.beton", data=None, labels=labels, classes=classes, identity={})


NAMES = ["cat", "dog", "fox"]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            ([0, 1, 2, 0], NAMES),
            ([0, 2, 2], NAMES),
            r"`test_data` must hold samples of all 3 classes, test.beton has none of class 1 \(dog\); add some, or",
        ),
        (
            ([0, 3, 0], [*NAMES, "owl", "hen", "ape"]),
            ([0, 1], [*NAMES, "owl", "hen", "ape"]),
            r"`train_data` .* all 6 classes, .* none of class 1 \(dog\), 2 \(fox\), 4 \(hen\) and 1 more; add",
        ),
        (([0, 1, 3], None), ([0, 1, 3], None), "`train_data` .* all 4 classes, train.beton has none of class 2; add"),
        (
            ([0, 1], None),
            ([0, 1, 2], None),
            "labels of `test_data` must be from 0 to 1, test.beton has 2 at sample 2 and others in 1 of 3; give",
        ),
        (([0], None), ([0, 1], None), "`train_data` must hold at least 2 samples, train.beton holds 1"),
        (([0, 1], None), ([1], None), "`test_data` must hold at least 2 samples, test.beton holds 1"),
        (
            ([0, 1], ["cat", "dog"]),
            ([0, 1], ["dog", "cat"]),
            "`test_data` must have the classes of `train_data`, but label 0 is dog in test.beton and cat in",
        ),
        (([0, 1, 2], NAMES), ([0, 1], NAMES[:2]), "label 2 is None in test.beton and fox in train.beton"),
    ],
)
def test_splits_that_do_not_fit_are_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        check_splits(data("train", *train), data("test", *test))


def test_classes_are_taken_from_where_they_are_known():
    assert check_splits(data("train", [0, 1, 2]), data("test", [2, 1, 0], NAMES)) == (NAMES, 3)
    assert check_splits(data("train", [0, 1, 1]), data("test", [1, 0])) == (None, 2)


def test_a_set_without_labels_is_refused(tmp_path):
    make_beton(tmp_path, [(24, 20)] * 4, encode="raw")
    flat = tmp_path / "images" / "class0"
    with pytest.raises(
        ValueError, match=r"`test_data` must have a label for every image, .*class0 has none; take a fold"
    ):
        open_labelled(str(flat), "test")


def test_a_negative_label_is_named_by_its_sample(tmp_path):
    beton = make_beton(tmp_path, [(24, 20)] * 4, encode="raw")
    content = bytearray((tmp_path / "set.beton").read_bytes())
    assert beton.labels.tolist() == [0, 0, 1, 1]
    spoil_label(content, beton, row=2, label=-1)
    (tmp_path / "set.beton").write_bytes(content)
    with pytest.raises(ValueError, match=r"`train_data` must have a label for every image, .* has -1 at sample 2"):
        open_labelled(str(tmp_path / "set.beton"), "train")


def spoil_label(content, beton, row, label):
    """Overwrite the label of a row in a `.beton`'s table: found by where the row's image pointer stands."""
    pointer = int(beton.offsets[row]).to_bytes(8, "little")
    start = content.index(pointer)
    before = int(beton.labels[row]).to_bytes(8, "little", signed=True)
    at = content.index(before, start + 8)
    content[at : at + 8] = label.to_bytes(8, "little", signed=True)


def test_features_that_are_not_finite_are_counted_and_the_first_is_named(monkeypatch):
    monkeypatch.setattr(checks, "CHUNK_NUMBERS", 12)
    x = torch.zeros(40, 5)
    check_finite(x, "training")
    x[17, 3], x[30, 0], x[31, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(
        ValueError, match=r"training features .* in 3 of 40 samples, first 17; the encoder has diverged"
    ):
        check_finite(x, "training")
    with pytest.raises(ValueError, match=r"test features .* in 3 of 40 samples, first 117"):
        check_finite(x, "test", first_row=100)
    y = torch.zeros(40, dtype=torch.int64)
    with pytest.raises(ValueError, match="test features must be finite"):
        check_labelled(torch.zeros(40, 5), y, x, y)
    with pytest.raises(ValueError, match=r"test labels must be integers from 0, got torch.int64 from -1"):
        check_labelled(torch.zeros(40, 5), y, torch.zeros(40, 5), y - 1)


def test_a_class_folder_without_images_is_named_with_its_set(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.png").touch()
    with pytest.raises(OSError, match=rf"`test_data` must hold images in every class folder of {tmp_path}: .* dog"):
        open_labelled(str(tmp_path), "test")
