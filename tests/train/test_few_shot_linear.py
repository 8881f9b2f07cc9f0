"""The classifier for few labels against an independent float64 fit, and what its scaling promises."""

import logging

import pytest
import torch
from sklearn.datasets import load_digits

from train.evaluation.few_shot_linear import PENALTY_C, fit_scores, standardize


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's handwritten digits, 8×8 pixels; 300 to train on, the rest to test."""
    data = load_digits()
    features, labels = torch.from_numpy(data.data).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:300], order[300:]
    return features[train], labels[train], features[test], labels[test]


def accuracy(train_x, train_y, test_x, test_y):
    train_x, test_x = standardize(train_x, test_x)
    return float((fit_scores(train_x, train_y, test_x, 10).argmax(dim=1) == test_y).double().mean())


def independent_accuracy(train_x, train_y, test_x, test_y):
    """Minimise C · Σ cross-entropy + ½ ‖W‖² by torch's L-BFGS in float64 on (x − mean) / std / √D."""
    mean, std = train_x.double().mean(0), train_x.double().std(0, correction=0)
    std[std == 0] = 1
    train, test = ((x.double() - mean) / std / train_x.shape[1] ** 0.5 for x in (train_x, test_x))
    weight = torch.zeros(10, train.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=2000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(train @ weight.T + bias, train_y, reduction="sum")
        loss = PENALTY_C * loss + weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(((test @ weight.T + bias).argmax(1) == test_y).double().mean())


def test_against_an_independent_fit(digits):
    ours = accuracy(*digits)
    assert 0.9 < ours < 0.97
    assert ours == pytest.approx(independent_accuracy(*digits), abs=1.5 / 1497)  # one sample at most


def test_scale_and_shift_of_the_features_do_not_matter(digits):
    train_x, train_y, test_x, test_y = digits
    generator = torch.Generator().manual_seed(1)
    scale = 10.0 ** (4 * torch.rand(64, generator=generator) - 2)
    shift = scale * torch.randn(64, generator=generator)
    moved = accuracy(train_x * scale + shift, train_y, test_x * scale + shift, test_y)
    assert moved == pytest.approx(accuracy(*digits), abs=1.5 / 1497)


def test_a_wider_copy_of_the_features_is_worth_the_same(digits):
    """Under a prior for each weight alone, features given four times would be regularised four times less."""
    train_x, train_y, test_x, test_y = digits
    wide = accuracy(train_x.repeat(1, 4), train_y, test_x.repeat(1, 4), test_y)
    assert wide == pytest.approx(accuracy(*digits), abs=1.5 / 1497)


def test_features_are_standardised_by_the_first_set():
    train = torch.tensor([[1.0, 7.0], [3.0, 7.0]], dtype=torch.float64)
    # mean (2, 7), std (1, 0 → left alone), √D = √2
    scaled, other = standardize(train, torch.tensor([[4.0, 8.0]]).half())
    root = 2**0.5
    torch.testing.assert_close(scaled, torch.tensor([[-1 / root, 0.0], [1 / root, 0.0]]))
    torch.testing.assert_close(other, torch.tensor([[2 / root, 1 / root]]))


def test_a_fit_that_stops_early_is_reported(digits, caplog):
    train_x, train_y, test_x, _ = digits
    scaled = standardize(train_x, test_x)
    with caplog.at_level(logging.WARNING):
        fit_scores(scaled[0], train_y, scaled[1], 10, max_iterations=3)
    assert caplog.messages == [
        "the linear classifier stopped unconverged after 3 iterations (300 samples of 64 features)"
    ]
    caplog.clear()
    accuracy(*digits)
    assert caplog.messages == []


@pytest.mark.parametrize("known", [(0, 7), (0, 3, 7)])
def test_scores_stand_in_the_column_of_their_class(digits, known):
    """Of two classes scikit-learn gives one column; classes without samples are never predicted."""
    train_x, train_y, test_x, test_y = digits
    train, test = (torch.isin(labels, torch.tensor(known)) for labels in (train_y, test_y))
    train_x, test_x = standardize(train_x, test_x)
    found = fit_scores(train_x[train], train_y[train], test_x[test], 10)
    assert found.shape == (int(test.sum()), 10)
    assert found.isfinite().any(dim=0).nonzero()[:, 0].tolist() == list(known)
    assert float((found.argmax(dim=1) == test_y[test]).double().mean()) > 0.95
