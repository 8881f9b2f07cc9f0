"""`evaluate.py logistic`: multinomial logistic regression of frozen representations by L-BFGS.

`search` is how SimCLR v1 (appendix B.8.1, after Kornblith et al., "Do Better ImageNet Models Transfer Better?", 2019)
classifies frozen features of other sets: central views, no augmentation, features as they are; 45 penalties, evenly
spaced in the logarithm from 1e-6 to 1e5, each fit starting at the optimum of the one before; the penalty that is best
on a validation split is fitted again to training and validation samples together, and measured once.

The papers do not say whether their λ goes with the sum or the mean of the cross-entropy. Here it is the mean, as
`train.evaluation.logistic` has it.

`fixed` chooses nothing, and so does with one label a class: `train.evaluation.few_shot_linear`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.subset import SubsetConfig, choose_rows
from train.evaluation.classification import ClassificationMetrics, measure
from train.evaluation.features import Features, FeatureSource
from train.evaluation.few_shot_subsets import FewShotConfig, Labelled, label_subsets
from train.evaluation.logistic import Classifier, Regression, scores
from train.evaluation.protocol import check_single_process
from train.evaluation.results import Result
from train.runtime import choose_device, read_ranks

__all__ = ["LogisticConfig", "run_logistic"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(FewShotConfig):
    """How the penalty is found."""

    penalty: Literal["search", "fixed"] = "search"
    """`search`: the best of many on a validation split; `fixed`: one for all, on standardised features (C = 10)."""
    penalty_range: tuple[float, float] = (1e-6, 1e5)
    """`search`: the smallest and the largest λ."""
    num_penalties: int = 45
    """`search`: how many λ, evenly spaced in the logarithm."""
    standardize: bool = False
    """`search`: divide each feature by its deviation over the samples that are fitted. The paper takes them as they
    are."""
    val_fraction: float = 0.1
    """`search`: share of every class of the labelled samples that λ is chosen on, at least one of each."""
    val_data: str | None = None
    """`search`: a validation set in place of that share: a `.beton` or a folder, with the same classes."""
    select_by: Literal["top1", "mean_per_class"] = "top1"
    """`search`: what penalties are compared by. Of equally good ones the largest is taken."""
    max_iterations: int = 1000
    """`search`: of L-BFGS for one λ, a safeguard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("penalty", ("search", "fixed")), ("select_by", ("top1", "mean_per_class"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)}")
        low, high = self.penalty_range
        if not 0.0 < low <= high < float("inf"):
            raise ValueError(
                f"`penalty_range` must be two finite numbers above 0, the smaller first, got [{low:g}, {high:g}]; "
                "the paper's are [1e-6, 1e5]"
            )
        for name in ("num_penalties", "max_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if (low < high) != (self.num_penalties > 1):
            raise ValueError(
                f"`num_penalties` must be 1 just where both ends of `penalty_range` are the same, got "
                f"{self.num_penalties} from {low:g} to {high:g}"
            )
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"`val_fraction` must be above 0 and below 1, got {self.val_fraction}; usual: 0.1")
        if self.penalty == "fixed" and self.val_data is not None:
            raise ValueError(f"`val_data` needs `penalty` search, got fixed with {self.val_data}")
        if self.val_data is not None and self.labels_per_class:
            raise ValueError(
                f"`val_data` must be null with `labels_per_class`, whose penalties are chosen on some of these few "
                f"labels, got {self.val_data}; leave it out, or evaluate all labels alone"
            )
        if self.penalty == "search" and self.num_penalties > 1 and 1 in self.labels_per_class:
            raise ValueError(
                "`labels_per_class` must be at least 2 each with `penalty` search, which chooses on one of them, "
                "got 1; take `--penalty fixed`"
            )

    @property
    def penalties(self) -> list[float]:
        """Every λ, the largest first."""
        low, high = self.penalty_range
        return [float(value) for value in np.geomspace(high, low, self.num_penalties)]

    @property
    def has_choice(self) -> bool:
        """Whether a penalty is chosen among several."""
        return self.penalty == "search" and self.num_penalties > 1


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What came of one set of labels."""

    figures: ClassificationMetrics
    penalty: float
    tried: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def run_logistic(config: LogisticConfig) -> Result:
    """Learn from the training set, or subsets of it, and measure on the test set.

    Raises:
        ValueError: a file is missing or damaged, classes do not fit, or a class has too few samples.
        OSError: likewise.
    """
    check_single_process("`evaluate.py logistic`")
    source = FeatureSource(config)
    validation_source = None if config.val_data is None else _validation_source(config, config.val_data, source)
    labels = torch.tensor(source.train.labels)
    subsets = list(label_subsets(labels, config))
    if config.has_choice and validation_source is None:
        for subset in subsets:  # what cannot be split is refused before anything is computed
            hold_out(labels if subset.rows is None else labels[subset.rows], config.val_fraction, config.seed)
    train, test = source.features("train"), source.features("test")
    if config.penalty == "fixed":
        outcomes = _fixed(train, test, subsets)
    else:
        validation = None if validation_source is None else validation_source.features("test")
        outcomes = [_searched(_chosen(train, subset), validation, test, config) for subset in subsets]
    by_amount: dict[str, list[_Outcome]] = {}
    for subset, outcome in zip(subsets, outcomes, strict=True):
        by_amount.setdefault(subset.amount, []).append(outcome)
    whole = outcomes[-1]
    return Result(
        protocol="logistic",
        figures={amount: [one.figures for one in found] for amount, found in by_amount.items()},
        seeds={amount: [one.seed for one in subsets if one.amount == amount] for amount in by_amount},
        chosen={"penalty": whole.penalty},
        chosen_by=_chosen_by(config),
        tried=whole.tried,
        details={"penalties": {amount: [one.penalty for one in found] for amount, found in by_amount.items()}}
        | whole.details,
        suffix="-".join([*(["fixed"] if config.penalty == "fixed" else []), *(["standardized"] * config.standardize)]),
    )


def hold_out(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Which samples choose and do not learn: a share of every class, at least one of each; a function of the seed.

    Args:
        labels: int64 [n], from 0.
        fraction: of each class.
        seed: which samples.

    Returns:
        bool [n].

    Raises:
        ValueError: nothing of a class would be left to learn from.
    """
    rows = choose_rows(SubsetConfig(fraction=fraction, seed=seed), labels.numpy(), None, len(labels))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[torch.from_numpy(rows)] = True
    counts, left = labels.bincount(), labels[~held_out].bincount(minlength=int(labels.max()) + 1)
    empty = ((counts > 0) & (left == 0)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"`val_fraction` {fraction:g} leaves no sample to learn from of class {empty[0]}, which has "
            f"{int(counts[empty[0]])} labelled; lower it, label more, or take `--penalty fixed`"
        )
    return held_out


def _searched(train: Features, validation: Features | None, test: Features, config: LogisticConfig) -> _Outcome:
    """Choose λ, fit it to training and validation samples together, and measure it."""
    device = choose_device(config.device, read_ranks())
    num_classes, held_out, tried = test.num_classes, None, []
    penalty, start = config.penalties[0], None

    def problem_of(sets: Sequence[Features], rows: Tensor | None = None) -> Regression:
        values, labels = [one.values for one in sets], [one.labels for one in sets]
        return Regression(values, labels, num_classes, rows=rows, standardize=config.standardize, device=device)

    if config.has_choice:
        if validation is None:
            held_out = hold_out(train.labels, config.val_fraction, config.seed)
        judge, judged = (train, held_out.nonzero()[:, 0]) if held_out is not None else (validation, None)
        assert judge is not None
        fits: list[Classifier] = []
        for fit in problem_of([train], None if held_out is None else ~held_out).path(
            config.penalties, max_iterations=config.max_iterations
        ):
            tried.append(_judge(fit, judge, judged, num_classes))
            fits.append(fit)
        best = max(range(len(tried)), key=lambda i: tried[i][f"validation_{config.select_by}"])
        if best in (0, len(tried) - 1):
            logger.warning("the best penalty, %.3g, is at the edge of `penalty_range`: widen it", fits[best].penalty)
        penalty, start = fits[best].penalty, fits[best]
    problem = problem_of([train] if validation is None else [train, validation])
    final = problem.fit(penalty, start, max_iterations=config.max_iterations)
    return _Outcome(
        figures=measure(scores(final, test.values), test.labels, num_classes, test.classes),
        penalty=penalty,
        tried=tried,
        details={
            "objective": "mean cross-entropy + penalty / 2 · ‖W‖²",
            "loss": final.loss,
            "iterations": final.iterations,
            "converged": final.converged,
            "num_samples": problem.num_samples,
            "num_validation_samples": _num_validation(validation, held_out),
        },
    )


def _judge(fit: Classifier, judge: Features, rows: Tensor | None, num_classes: int) -> dict[str, Any]:
    """A penalty, and its figures on the validation samples."""
    labels = judge.labels if rows is None else judge.labels[rows]
    figures = measure(scores(fit, judge.values, rows), labels, num_classes)
    return {
        "penalty": fit.penalty,
        "validation_top1": figures.top1,
        "validation_mean_per_class": figures.mean_per_class,
        "iterations": fit.iterations,
        "converged": fit.converged,
    }


def _fixed(train: Features, test: Features, subsets: Sequence[Labelled]) -> list[_Outcome]:
    """One penalty for all, on features that the whole training set standardises."""
    from train.evaluation.few_shot_linear import PENALTY_C, fit_scores, standardize  # takes scikit-learn with it

    train_x, test_x = standardize(train.values, test.values)
    outcomes = []
    for subset in subsets:
        some = _chosen(replace(train, values=train_x), subset)
        found = fit_scores(some.values, some.labels, test_x, test.num_classes)
        figures = measure(found, test.labels, test.num_classes, test.classes)
        objective = "mean cross-entropy + penalty / 2 · ‖W‖², of standardised features / √D"
        penalty = 1 / (PENALTY_C * len(some.labels))
        outcomes.append(_Outcome(figures=figures, penalty=penalty, details={"objective": objective, "C": PENALTY_C}))
    return outcomes


def _chosen(train: Features, subset: Labelled) -> Features:
    """The samples of a subset."""
    if subset.rows is None:
        return train
    return replace(train, values=train.values[subset.rows], labels=train.labels[subset.rows])


def _validation_source(config: LogisticConfig, path: str, source: FeatureSource) -> FeatureSource:
    """The validation set, in the place of the test set.

    Raises:
        ValueError: it is the training or the test set, or cannot be used.
    """
    try:
        found = FeatureSource(replace(config, test_data=path, val_data=None))
    except ValueError as error:
        raise ValueError(str(error).replace("`test_data`", "`val_data`")) from error
    for other in (source.train, source.test):
        if found.test.identity == other.identity:
            raise ValueError(f"`val_data` must be another set than {other.field}, got {path} for both")
    return found


def _num_validation(validation: Features | None, held_out: Tensor | None) -> int:
    if held_out is not None:
        return int(held_out.sum())
    return 0 if validation is None else len(validation.labels)


def _chosen_by(config: LogisticConfig) -> str:
    if not config.has_choice:
        return "given in advance"
    split = config.val_data or f"{config.val_fraction:g} of each class of the labelled training samples"
    return (
        f"{config.select_by} on a validation split ({split}), the largest of equally good ones; then fitted to "
        "training and validation samples together"
    )
