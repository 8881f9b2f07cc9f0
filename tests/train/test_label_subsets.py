"""Balanced subsets: how many, which, and from which seed."""

import numpy as np
import pytest
import torch

from train.evaluation.label_subsets import balanced_subset


@pytest.fixture
def labels():
    """400 labels of the classes 0, 2, 3 and 7, of different sizes, shuffled."""
    values = torch.tensor([0] * 200 + [2] * 100 + [3] * 60 + [7] * 40)
    return values[torch.randperm(400, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("per_class", [1, 5, 40])
def test_every_class_gives_the_same_number_of_rows(labels, per_class):
    rows = balanced_subset(labels, per_class, seed=3)
    assert rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert labels[rows].unique(return_counts=True)[1].tolist() == [per_class] * 4


def test_it_depends_on_the_seed_alone(labels):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = balanced_subset(labels, 5, seed=0)
    torch.manual_seed(1)
    assert torch.equal(balanced_subset(labels, 5, seed=0), first)
    assert not torch.equal(balanced_subset(labels, 5, seed=1), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_subsets_of_one_seed_are_nested(labels):
    small, large = (set(balanced_subset(labels, n, seed=4).tolist()) for n in (5, 20))
    assert small < large


def test_every_row_is_chosen_equally_often():
    labels = torch.arange(400) % 4
    counts = np.zeros(400)
    for seed in range(500):
        counts[balanced_subset(labels, 20, seed).numpy()] += 1
    # 500 draws of probability 0.2 for each of 400 rows: mean 100, deviation 8.9
    assert counts.mean() == 100
    assert abs(counts - 100).max() < 5 * 8.9
    assert 7 < counts.std() < 11


def test_the_subset_is_the_same_on_every_machine():
    assert balanced_subset(torch.arange(20) % 2, 3, seed=0).tolist() == [1, 4, 5, 13, 16, 18]


def test_too_small_a_class_is_named(labels):
    with pytest.raises(ValueError, match=r"must be between 1 and 40, the size of class 7, got 41; ask for fewer"):
        balanced_subset(labels, 41, seed=0)
    with pytest.raises(ValueError, match="must be between 1 and 40"):
        balanced_subset(labels, 0, seed=0)
