"""Multinomial logistic regression of frozen features by L-BFGS, for a whole range of penalties.

Minimised is the mean cross-entropy + λ/2 · ‖W‖², over weights W and biases b, which carry no penalty. scikit-learn's
LogisticRegression has the same optimum with C = 1 / (λ · n), n its training samples.

Loss and gradient are computed on the device, in chunks of rows, so that features may lie in a memory-mapped file and
are never copied. Products are taken in the features' type, everything else in float64.

L-BFGS needs many steps where the loss is curved far more in some directions than in others, as among features that are
correlated or never negative. So it works in other coordinates of the same problem: features are centred, which only
moves the bias, and the weights of class c are written as V_c · (q_c Σ + λ)^(−1/2), Σ the covariance of the features,
q_c the mean of p (1 − p) over the probabilities p of that class where the search starts. The curvature for w_c is the
mean of p (1 − p) x xᵀ, and so about 1 in every direction, were it not that p and x depend on each other.

n samples, D features, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.evaluation.exact_products import exact_products
from train.evaluation.lbfgs import minimize

CHUNK_NUMBERS = 2**22  # of features, or of scores, that are worked on at a time: 32 MiB in float64
MOST_CORRELATED = 4096  # features; of more, as of the pixels of large images, Σ's diagonal alone is used
MAX_ITERATIONS = 1000  # a safeguard: 10,000 samples of 512 features take up to 60
SEARCH_TOLERANCE = 1e-5  # of the largest derivative in the coordinates above; accuracies are settled before
TOLERANCE = 1e-7  # of the fit that is measured: probabilities agree with the exact ones to four digits
LEAST_SPREAD = 1e-6  # of q_c: classes that are told apart for certain would have coordinates without bounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """Scores are x · Wᵀ + b; their softmax are the probabilities."""

    weight: Tensor
    """float64 [C, D], on the CPU, for features as they are given."""
    bias: Tensor
    """float64 [C]."""
    penalty: float
    """λ."""
    loss: float
    """The mean cross-entropy + λ/2 · ‖W‖² that was reached."""
    iterations: int
    """From where the fit started."""
    converged: bool
    """Whether the gradient vanished to the tolerance."""


class Regression:
    """The problem: features with labels, and what the coordinates need to know of them.

    Args:
        features: sets that count as one, [n, D] together, float32 or float64 (others as float32), on any device.
        labels: of each set, integers from 0 to C − 1.
        num_classes: C.
        rows: bool [n], which samples are fitted; None: all.
        standardize: penalise the weights of features that are divided by their deviations (by 1 where that is 0).
        device: to compute on; by default that of the first set.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        labels: Sequence[Tensor],
        num_classes: int,
        *,
        rows: Tensor | None = None,
        standardize: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or features[0].device
        self._sets = [_placed(x, self._device) for x in features]
        self._labels = labels
        self._rows = None if rows is None else torch.split(rows, [len(x) for x in features])
        self.num_samples = sum(len(x) for x in features) if rows is None else int(rows.sum())
        self.num_classes, self.num_features = num_classes, features[0].shape[1]
        with torch.no_grad(), exact_products(self._device):
            self._mean = self._mean_of_rows()
            covariance, is_whole = self._covariance()
            variance = covariance.diagonal() if is_whole else covariance
            deviation = variance.sqrt()
            plain = torch.ones_like(variance)
            self._scale = torch.where(deviation > 0, deviation, plain) if standardize else plain
            if is_whole:
                variance, axes = torch.linalg.eigh(covariance / self._scale / self._scale[:, None])
                self._variance, self._axes = variance.clamp(min=0.0), axes
            else:
                self._variance, self._axes = variance / self._scale**2, None

    def loss_and_gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean cross-entropy of scores x · Wᵀ + b, and its gradient, in float64.

        Args:
            weight: float64 [C, D], on the device.
            bias: float64 [C].

        Returns:
            A scalar, [C, D] and [C].
        """
        loss = weight.new_zeros(())
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, y, fitted in self._chunks():
            log_prob = ((x @ weight.to(x.dtype).T).double() + bias).log_softmax(dim=1)
            of_label = log_prob.gather(1, y[:, None])
            residual = log_prob.exp_().scatter_add_(1, y[:, None], torch.full_like(of_label, -1.0))
            if fitted is not None:
                of_label, residual = of_label * fitted[:, None], residual * fitted[:, None]
            loss -= of_label.sum()
            d_weight += (residual.to(x.dtype).T @ x).double()
            d_bias += residual.sum(dim=0)
        return loss / self.num_samples, d_weight / self.num_samples, d_bias / self.num_samples

    def fit(
        self,
        penalty: float,
        start: Classifier | None = None,
        *,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> Classifier:
        """The optimum for one λ > 0; a fit that stops before it converges is reported in the log.

        Args:
            penalty: λ.
            start: where to begin, for instance the optimum of the next larger penalty; None: at 0.
            tolerance: of the largest derivative in the coordinates of this module.
            max_iterations: of L-BFGS.
        """

        def objective(point: Tensor) -> tuple[Tensor, Tensor]:
            weight, bias = self._weight_and_bias(point, units)
            loss, d_weight, d_bias = self.loss_and_gradient(weight, bias)
            scaled = weight * self._scale
            d_scaled = (d_weight - d_bias[:, None] * self._mean) / self._scale + penalty * scaled
            rotated = d_scaled if self._axes is None else d_scaled @ self._axes
            gradient = torch.cat([rotated, d_bias[:, None]], dim=1) * units
            return loss + penalty / 2 * scaled.square().sum(), gradient.flatten()

        with torch.no_grad(), exact_products(self._device):
            weight, bias = self._placed_start(start)
            units = self._units(weight, bias, penalty)
            point = self._point(weight, bias, units)
            found = minimize(objective, point, tolerance=tolerance, max_iterations=max_iterations)
            weight, bias = self._weight_and_bias(found.point, units)
        if not found.converged:
            logger.warning(
                "logistic regression with penalty %.3g stopped unconverged after %d iterations (%d samples of %d "
                "features): its largest derivative is %.1e, not %.0e",
                penalty, found.iterations, self.num_samples, self.num_features, found.largest_derivative, tolerance,
            )  # fmt: skip
        return Classifier(
            weight=weight.cpu(),
            bias=bias.cpu(),
            penalty=penalty,
            loss=found.value,
            iterations=found.iterations,
            converged=found.converged,
        )

    def path(self, penalties: Sequence[float], *, max_iterations: int = MAX_ITERATIONS) -> Iterator[Classifier]:
        """The optimum for each λ, largest first; each search starts at the optimum before."""
        start = None
        for penalty in sorted(penalties, reverse=True):
            start = self.fit(penalty, start, tolerance=SEARCH_TOLERANCE, max_iterations=max_iterations)
            yield start

    def _weight_and_bias(self, point: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """For features as they are given, from the coordinates that are searched in."""
        coordinates = point.view(self.num_classes, -1) * units
        rotated = coordinates[:, :-1]
        weight = (rotated if self._axes is None else rotated @ self._axes.T) / self._scale
        return weight, coordinates[:, -1] - weight @ self._mean

    def _point(self, weight: Tensor, bias: Tensor, units: Tensor) -> Tensor:
        """The way back, [C · (D + 1)]."""
        scaled = weight * self._scale
        rotated = scaled if self._axes is None else scaled @ self._axes
        return (torch.cat([rotated, (bias + weight @ self._mean)[:, None]], dim=1) / units).flatten()

    def _units(self, weight: Tensor, bias: Tensor, penalty: float) -> Tensor:
        """What a coordinate counts, [C, D + 1]: one over the root of the curvature that is expected."""
        spread = torch.zeros_like(bias)
        for x, _, fitted in self._chunks():
            prob = ((x @ weight.to(x.dtype).T).double() + bias).softmax(dim=1)
            some = prob * (1 - prob)
            spread += (some if fitted is None else some * fitted[:, None]).sum(dim=0)
        spread = (spread / self.num_samples).clamp(min=LEAST_SPREAD)[:, None]
        return torch.cat([spread * self._variance + penalty, spread], dim=1).rsqrt()

    def _placed_start(self, start: Classifier | None) -> tuple[Tensor, Tensor]:
        if start is not None:
            return start.weight.to(self._device), start.bias.to(self._device)
        zeros = torch.zeros(self.num_classes, self.num_features + 1, dtype=torch.float64, device=self._device)
        return zeros[:, :-1], zeros[:, -1]

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Features, labels, and 1 or 0 by whether a sample is fitted."""
        size = max(1, CHUNK_NUMBERS // max(self.num_features, self.num_classes))
        for i, (features, labels) in enumerate(zip(self._sets, self._labels, strict=True)):
            for start in range(0, len(features), size):
                part = slice(start, start + size)
                x = features[part].to(self._device)
                fitted = None if self._rows is None else self._rows[i][part].to(self._device, torch.float64)
                yield x if x.dtype == torch.float64 else x.float(), labels[part].to(self._device), fitted

    def _mean_of_rows(self) -> Tensor:
        total = torch.zeros(self.num_features, dtype=torch.float64, device=self._device)
        for x, _, fitted in self._chunks():
            total += (x if fitted is None else x[fitted > 0]).sum(dim=0, dtype=torch.float64)
        return total / self.num_samples

    def _covariance(self) -> tuple[Tensor, bool]:
        """Σ, float64 [D, D], and True; or its diagonal [D], and False."""
        is_whole = self.num_features <= MOST_CORRELATED
        shape = (self.num_features, self.num_features) if is_whole else (self.num_features,)
        total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for x, _, fitted in self._chunks():
            centred = (x if fitted is None else x[fitted > 0]) - self._mean.to(x.dtype)
            total += (centred.T @ centred).double() if is_whole else centred.square().sum(dim=0, dtype=torch.float64)
        return total / self.num_samples, is_whole


def scores(classifier: Classifier, features: Tensor, rows: Tensor | None = None) -> Tensor:
    """The scores of a classifier, float32 [n, C] on the CPU.

    Args:
        classifier: from `Regression`.
        features: [N, D], on any device; computed there, in chunks.
        rows: int64 [n], which samples; None: all N.
    """
    size = max(1, CHUNK_NUMBERS // max(features.shape[1], len(classifier.bias)))
    parts = torch.split(features, size) if rows is None else (features[some] for some in torch.split(rows, size))
    weight, bias = classifier.weight.to(features.device).T, classifier.bias.to(features.device)
    with torch.no_grad(), exact_products(features.device):
        return torch.cat([(part.double() @ weight + bias).float().cpu() for part in parts])


def _placed(features: Tensor, device: torch.device) -> Tensor:
    """On a GPU once and for all, where they leave half of its free memory; else where they are, and sent in chunks."""
    if device.type == "cuda" and features.numel() * features.element_size() <= torch.cuda.mem_get_info(device)[0] // 2:
        return features.to(device)
    return features
