"""Logistic regression against scikit-learn's and autograd's in float64, over the penalties that the papers try."""

import logging

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from train.evaluation import logistic
from train.evaluation.logistic import Regression, scores

CLASSES = 5


def problem(num, seed, *, width=12, dtype=torch.float32):
    """Overlapping clusters of positive, correlated features with means and deviations of their own."""
    world = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, width, generator=world, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=world, dtype=torch.float64)
    spread = torch.logspace(-1, 0.5, width, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    noise = 2 * torch.randn(num, width, generator=generator, dtype=torch.float64)
    return ((((centres[labels] + noise) @ mixing).clamp(min=-2) + 2) * spread).to(dtype), labels


@pytest.fixture(scope="module")
def data():
    return problem(301, seed=1), problem(203, seed=2)


def judge(x, y, penalty):
    """Scikit-learn's own, in float64, to the end."""
    return LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=100_000, solver="newton-cholesky").fit(
        x.double().numpy(), y.numpy()
    )


def probabilities(classifier, x):
    return scores(classifier, x).double().softmax(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_path_agrees_with_scikit_learn(data, dtype):
    (x, y), (test_x, test_y) = data
    x, test_x = x.to(dtype), test_x.to(dtype)
    penalties = np.geomspace(1e-6, 1e5, 12)
    regression = Regression([x], [y], CLASSES)
    path = list(regression.path(penalties.tolist()))
    assert [fit.penalty for fit in path] == sorted(penalties, reverse=True)
    accuracies = []
    for found in path:
        fit = regression.fit(found.penalty, found)
        peer = judge(x, y, fit.penalty)
        expected = peer.predict_proba(test_x.double().numpy())
        np.testing.assert_allclose(probabilities(fit, test_x), expected, atol=1e-4)
        if fit.penalty < 1e3:  # above, all samples get nearly the same scores
            assert (probabilities(fit, test_x).argmax(1) == expected.argmax(1)).all()
        np.testing.assert_allclose(probabilities(found, test_x), expected, atol=2e-3)
        assert fit.converged
        assert found.converged
        accuracies.append(peer.score(test_x.double().numpy(), test_y.numpy()))
    assert max(accuracies) - accuracies[0] > 0.1, "the penalties must matter"


def test_the_fit_that_is_measured_is_closer(data):
    (x, y), (test_x, _) = data
    fit = Regression([x], [y], CLASSES).fit(1e-5)
    peer = judge(x, y, 1e-5)
    np.testing.assert_allclose(probabilities(fit, test_x), peer.predict_proba(test_x.double().numpy()), atol=1e-5)


def test_the_loss_is_the_mean_and_spares_the_bias(data):
    """The formula of the documentation, by autograd in float64; at the optimum its gradient vanishes."""
    (x, y), _ = data
    fit = Regression([x.double()], [y], CLASSES).fit(0.01)
    weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x.double() @ weight.T + bias, y) + 0.01 / 2 * weight.square().sum()
    assert fit.loss == pytest.approx(float(loss.detach()), abs=1e-12)
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert float(gradient.abs().max()) < 1e-6


def test_the_gradient_is_autograds_whatever_the_chunks(data, monkeypatch):
    (x, y), _ = data
    x = x.double()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(CLASSES, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64, requires_grad=True)
    fitted = torch.arange(301) % 3 > 0
    expected = torch.nn.functional.cross_entropy(x[fitted] @ weight.T + bias, y[fitted])
    d_weight, d_bias = torch.autograd.grad(expected, (weight, bias))
    for numbers in (2**22, 12 * 7):
        monkeypatch.setattr(logistic, "CHUNK_NUMBERS", numbers)
        parts = Regression([x[:100], x[100:]], [y[:100], y[100:]], CLASSES, rows=fitted)
        found = parts.loss_and_gradient(weight.detach(), bias.detach())
        for value, truth in zip(found, (expected.detach(), d_weight, d_bias), strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)


def test_rows_that_are_not_fitted_do_not_count(data):
    (x, y), _ = data
    fitted = torch.arange(301) % 4 > 0
    some = Regression([x], [y], CLASSES, rows=fitted)
    alone = Regression([x[fitted]], [y[fitted]], CLASSES)
    assert some.num_samples == alone.num_samples == int(fitted.sum())
    torch.testing.assert_close(some.fit(1e-3).weight, alone.fit(1e-3).weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("most_correlated", [4096, 1])
def test_standardised_features_are_those_of_scikit_learn(data, monkeypatch, most_correlated):
    """With a constant feature; and with the diagonal of the covariance alone."""
    monkeypatch.setattr(logistic, "MOST_CORRELATED", most_correlated)
    (x, y), (test_x, _) = data
    x, test_x = (torch.cat([part, torch.full((len(part), 1), 3.0)], dim=1).double() for part in (x, test_x))
    fit = Regression([x], [y], CLASSES, standardize=True).fit(0.003)
    deviation = x.std(dim=0, correction=0)
    deviation[-1] = 1
    peer = judge(x / deviation, y, 0.003)
    np.testing.assert_allclose(probabilities(fit, test_x), peer.predict_proba((test_x / deviation).numpy()), atol=1e-5)
    assert fit.weight[:, -1].abs().max() < 1e-5, "a constant feature is the bias's"


def test_more_features_than_samples(data):
    x, y = problem(40, seed=5, width=64)
    test_x, _ = problem(100, seed=6, width=64)
    fit = Regression([x], [y], CLASSES).fit(1.0)
    np.testing.assert_allclose(
        probabilities(fit, test_x), judge(x, y, 1.0).predict_proba(test_x.double().numpy()), atol=1e-4
    )


def test_a_start_is_where_the_search_begins(data):
    (x, y), (test_x, _) = data
    regression = Regression([x], [y], CLASSES, standardize=True)
    cold = regression.fit(1e-4)
    again = regression.fit(1e-4, cold)
    assert cold.iterations > 10
    assert again.iterations <= 5
    warm = regression.fit(1e-4, regression.fit(1e-2))
    np.testing.assert_allclose(probabilities(warm, test_x), probabilities(cold, test_x), atol=1e-5)


def test_a_fit_that_stops_early_is_reported(data, caplog):
    (x, y), _ = data
    with caplog.at_level(logging.WARNING):
        fit = Regression([x], [y], CLASSES).fit(1e-4, max_iterations=3)
    assert not fit.converged
    assert fit.iterations == 3
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        "logistic regression with penalty 0.0001 stopped unconverged after 3 iterations (301 samples of 12 features)"
    )


def test_features_are_read_in_chunks_and_never_copied(data, monkeypatch):
    """Of a map of a file: no product is larger than a chunk, and no chunk is of more rows than it may be."""
    (x, y), _ = data
    monkeypatch.setattr(logistic, "CHUNK_NUMBERS", 12 * 32)
    regression, sizes = Regression([x], [y], CLASSES), []
    chunks = regression._chunks

    def watched():
        for part, labels, fitted in chunks():
            assert part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a view, not a copy"
            sizes.append(len(part))
            yield part, labels, fitted

    monkeypatch.setattr(regression, "_chunks", watched)
    regression.fit(0.1)
    assert max(sizes) == 32
    assert sum(sizes) % 301 == 0


def test_scores_of_some_rows(data):
    (x, y), _ = data
    fit = Regression([x], [y], CLASSES).fit(0.1)
    expected = (x.double() @ fit.weight.T + fit.bias).float()
    torch.testing.assert_close(scores(fit, x), expected)
    rows = torch.tensor([0, 7, 300])
    torch.testing.assert_close(scores(fit, x, rows), expected[rows])
