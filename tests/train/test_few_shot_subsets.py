"""Which labels are used: every amount with every seed, and all of them once."""

import pytest
import torch

from pipelines.subset import balanced_subset
from train.evaluation.few_shot_subsets import FewShotConfig, label_subsets

LABELS = torch.arange(60) % 3
DATA = {"checkpoint": "run", "train_data": "train.beton", "test_data": "test.beton"}


def test_every_amount_has_its_seeds_and_all_labels_come_last():
    found = list(label_subsets(LABELS, FewShotConfig(**DATA, labels_per_class=(1, 5), num_seeds=2, seed=3)))
    assert [(one.amount, one.seed) for one in found] == [("1", 3), ("1", 4), ("5", 3), ("5", 4), ("all", 3)]
    for one in found[:-1]:
        assert torch.equal(one.rows, balanced_subset(LABELS, int(one.amount), one.seed))
    assert found[-1].rows is None
    assert set(found[0].rows.tolist()) < set(found[2].rows.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 0}, "`num_seeds` must be at least 1, got 0"),
        ({"labels_per_class": (5, 0)}, "`labels_per_class` must be at least 1 each, and each once, got [5, 0]"),
        ({"labels_per_class": (5, 5)}, "`labels_per_class` must be at least 1 each, and each once, got [5, 5]"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError) as caught:
        FewShotConfig(**DATA, **change)
    assert str(caught.value) == message


def test_too_few_samples_of_a_class_are_named():
    with pytest.raises(ValueError, match="labels per class must be between 1 and 20, the size of class 0, got 21"):
        list(label_subsets(LABELS, FewShotConfig(**DATA, labels_per_class=(21,))))
