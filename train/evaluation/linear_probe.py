"""Linear classification of frozen features: multinomial logistic regression by scikit-learn's L-BFGS.

Features are standardised with the training set's means and deviations, and divided by √D. So one fixed L2
penalty means the same for every representation, whatever its scale and width: a prior under which a logit
has variance C.

N test samples, M training samples, D features.
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

from train.evaluation.checks import check_labelled

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


def fit_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    penalty_c: float = PENALTY_C,
    max_iterations: int = MAX_ITERATIONS,
) -> float:
    """Accuracy on the test set of a classifier fitted to features that are already standardised.

    A fit that stops before it converges is reported in the log; its accuracy stands for what it reached.
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
    return float(model.score(_host(test_x), test_y.cpu().numpy()))


def linear_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Share of test samples, in [0, 1], that a linear classifier of the training features gets right.

    Args:
        train_x: features [M, D], any floating dtype, on any device.
        train_y: labels [M], integers from 0.
        test_x: features [N, D].
        test_y: labels [N]; a class that is missing in `train_y` counts as wrong.
    """
    check_labelled(train_x, train_y, test_x, test_y)
    train_x, test_x = standardize(train_x, test_x)
    return fit_accuracy(train_x, train_y, test_x, test_y)


def _host(features: Tensor) -> FloatArray:
    array: FloatArray = features.detach().cpu().float().numpy()
    return array
