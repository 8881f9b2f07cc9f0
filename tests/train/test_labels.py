"""The labels of a training set: those that are used, and the first that does not fit by name."""

import numpy as np
import pytest

from pipelines.build import DataConfig, open_data
from pipelines.subset import SubsetConfig
from tests.pipelines.betons import make_beton
from train.labels import check_labels, labels_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("data"), [(12, 10)] * 8, encode="raw").path


def test_of_a_part_they_are_those_of_its_rows(data):
    whole = open_data(DataConfig(path=str(data)))
    part = open_data(DataConfig(path=str(data), subset=SubsetConfig(per_class=1)))
    assert np.array_equal(labels_of(whole)[part.rows], labels_of(part))
    assert sorted(labels_of(part)) == sorted(set(whole.labels.tolist()))


def test_a_label_beyond_the_classes_is_named(data):
    found = open_data(DataConfig(path=str(data)))
    count = int(found.labels.max()) + 1
    check_labels(found, count, path="x.beton")
    row = int((found.labels == count - 1).argmax())
    with pytest.raises(
        ValueError, match=rf"^labels of x.beton must be from 0 to {count - 2} .* got {count - 1} at sample {row} and in"
    ):
        check_labels(found, count - 1, path="x.beton")
