"""A linear classifier for few labels: multinomial logistic regression with one fixed penalty, by scikit-learn's L-BFGS.

With one label a class there is nothing to choose a penalty on. So features are standardised with the training set's
means and deviations, which takes no labels, and divided by √D: then one fixed L2 penalty means the same for every
representation, whatever its scale and width, a prior under which a logit has variance C.

N test samples, M training samples, D features, K classes.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

PENALTY_C = 10.0  # one value for all representations: the power of ten that serves the digits' raw pixels best
MAX_ITERATIONS = 10_000  # a safeguard: 50,000 samples of 512 features take about 300

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]


def standardize(train_x: Tensor, *others: Tensor) -> list[Tensor]:
    """Shift and scale each feature by its mean and deviation over `train_x`, and divide by √D.

    A feature that is constant in `train_x` is only shifted. The statistics need no labels, so they may come
    from more samples than those that a classifier is then trained on.

    Returns:
        `train_x` and `others` as float32 on the CPU.
    """
    scaler = StandardScaler().fit(_host(train_x))
    width = np.float32(np.sqrt(train_x.shape[1]))
    return [torch.from_numpy(scaler.transform(_host(x)) / width) for x in (train_x, *others)]


def fit_scores(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    num_classes: int,
    *,
    penalty_c: float = PENALTY_C,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """Scores of the test set by a classifier fitted to features that are already standardised.

    A fit that stops before it converges is reported in the log; its scores are those of what it reached.

    Args:
        train_x: [M, D].
        train_y: integers from 0 to K − 1, [M], of two classes at least.
        test_x: [N, D].
        num_classes: K.
        penalty_c: scikit-learn's C.
        max_iterations: of L-BFGS.

    Returns:
        float32 [N, K]; −∞ for a class without training samples.
    """
    model = LogisticRegression(C=penalty_c, max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(_host(train_x), train_y.cpu().numpy())
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning(
            "the linear classifier stopped unconverged after %d iterations (%d samples of %d features)",
            int(model.n_iter_.max()),
            *train_x.shape,
        )
    known = model.decision_function(_host(test_x))
    if known.ndim == 1:  # of two classes scikit-learn gives the difference
        known = np.stack([-known / 2, known / 2], axis=1)
    scores = torch.full((len(test_x), num_classes), -torch.inf)
    scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(known).float()
    return scores


def _host(features: Tensor) -> FloatArray:
    array: FloatArray = features.detach().cpu().float().numpy()
    return array
