"""Which classes a classifier of frozen representations takes for which: the confusion matrix, and its largest entries.

A row is a true class and sums to 100 %: the share of its test images that were taken for each class.

Legend: m training images, n test images, D width of h, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tools.pictures_canvas import Drawn, new_figure, shortened
from tools.pictures_source import Source, SourceConfig
from tools.preview_sheet import INK, PAPER
from train.evaluation.features import Features
from train.evaluation.knn import knn_predict

NUM_LISTED = 10
MAX_WRITTEN = 20  # classes, up to which every cell has its number
MAX_NAMED = 60  # classes, up to which every row has its name
PENALTY_C = 1.0  # scikit-learn's default, on standardised features


@dataclass(frozen=True, kw_only=True)
class ConfusionConfig(SourceConfig):
    """Who classifies what."""

    train_data: str
    """What labels are learned from, with the same classes as `test_data`."""
    classifier: Literal["knn", "logistic"] = "knn"
    """Weighted nearest neighbours, or multinomial logistic regression on standardised features (L2, C = 1)."""
    k: int = 20
    """Neighbours that vote; all training images where there are fewer."""
    temperature: float = 0.07
    """Of the neighbours' votes."""

    @property
    def train_data_used(self) -> str:
        """See `SourceConfig`."""
        return self.train_data


def draw(config: ConfusionConfig) -> Drawn:
    """Draw the matrix, with the largest confusions beside it.

    Raises:
        ValueError: the sets have no labels, or one class alone, or do not fit each other.
    """
    from sklearn.metrics import confusion_matrix

    source = Source(config)
    train, test = source.features("train"), source.features("test")
    predicted = predict(config, train, test)
    labels = np.arange(source.num_classes)
    counts: NDArray[np.int64] = confusion_matrix(test.labels.numpy(), predicted, labels=labels)
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    largest = largest_confusions(counts)
    accuracy = float(np.trace(counts) / counts.sum())

    side = min(9.0, 3.6 + 0.42 * min(source.num_classes, MAX_WRITTEN))
    how = f"{config.k} nearest neighbours" if config.classifier == "knn" else "logistic regression"
    figure = new_figure(
        side + 3.4,
        side + 0.7,
        f"Confusion matrix: {how} on h, {100 * accuracy:.1f} % right",
        f"{source.words()}, {counts.sum():,} images; a row is a true class and sums to 100 %",
    )
    panel, beside = figure.subplots(1, 2, width_ratios=(side, 2.9))
    _draw_matrix(panel, shares, source.names)
    _draw_list(beside, [(shares[i, j], source.names[i], source.names[j]) for i, j in largest])
    numbers = source.about() | {
        "picture": "confusion",
        "train_data": config.train_data,
        "classifier": config.classifier,
        "settings": {"k": config.k, "temperature": config.temperature}
        if config.classifier == "knn"
        else {"penalty_c": PENALTY_C},
        "accuracy": accuracy,
        "classes": source.names,
        "counts": counts.tolist(),
        "largest": [
            {"true": source.names[i], "taken_for": source.names[j], "share": float(shares[i, j])} for i, j in largest
        ],
    }
    return Drawn(figure=figure, numbers=numbers, folder=source.folder, name=f"confusion-{config.classifier}")


def predict(config: ConfusionConfig, train: Features, test: Features) -> NDArray[np.int64]:
    """The class that each test image is taken for, int64 [n]."""
    if config.classifier == "knn":
        k = min(config.k, len(train.labels))
        found = knn_predict(train.values, train.labels, test.values, k=k, temperature=config.temperature)
        by_neighbours: NDArray[np.int64] = found.numpy()
        return by_neighbours
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY_C, max_iter=1000))
    model.fit(train.values.numpy(), train.labels.numpy())
    by_regression: NDArray[np.int64] = model.predict(test.values.numpy())
    return by_regression


def largest_confusions(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """True and predicted class of the largest shares off the diagonal, largest first; none that are 0."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(shares, 0.0)
    order = np.argsort(-shares, axis=None, kind="stable")[:NUM_LISTED]
    pairs = [divmod(int(cell), len(counts)) for cell in order]
    return [(i, j) for i, j in pairs if shares[i, j] > 0.0]


def _draw_matrix(panel: Axes, shares: NDArray[np.float64], names: list[str]) -> None:
    num = len(names)
    image = panel.imshow(100 * shares, cmap="Blues", vmin=0.0, vmax=100.0, interpolation="nearest")
    panel.grid(visible=False)
    bar = panel.figure.colorbar(image, ax=panel, fraction=0.04, pad=0.02)
    bar.set_label("share of the true class, %")
    panel.set(xlabel="taken for", ylabel="true class")
    if num <= MAX_NAMED:
        size = 9 if num <= MAX_WRITTEN else 6
        short = [shortened(name, 18) for name in names]
        panel.set_xticks(range(num), short, rotation=90 if num > 12 else 45, ha="center" if num > 12 else "right")
        panel.set_yticks(range(num), short)
        panel.tick_params(labelsize=size, length=0)
    if num <= MAX_WRITTEN:
        for (i, j), share in np.ndenumerate(shares):
            if round(100 * share) > 0:
                color = PAPER if share > 0.65 else INK
                panel.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)


def _draw_list(panel: Axes, listed: list[tuple[Any, str, str]]) -> None:
    panel.axis("off")
    panel.set_title("Largest confusions")
    lines = [f"{100 * share:4.1f} %  {shortened(a, 14)} → {shortened(b, 14)}" for share, a, b in listed]
    panel.text(0.0, 1.0, "\n".join(lines) or "none", va="top", fontsize=9, linespacing=1.7, transform=panel.transAxes)
