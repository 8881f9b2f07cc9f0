"""Representations h and projections z in the plane, coloured by class: by t-SNE, or onto principal components.

Each representation is scaled to length 1 first: both papers compare directions. t-SNE (van der Maaten & Hinton 2008,
scikit-learn's) starts from the first two principal components, on one thread, so that a seed gives one picture. It
keeps neighbours together; distances between groups, and their sizes, mean little.

Legend: n images that are shown, D width of a representation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tools.pictures_canvas import COLORS, MARKERS, Drawn, new_figure, shortened
from tools.pictures_source import Source, SourceConfig, balanced_rows, check_head, shown_classes

TSNE_DIMS = 50  # principal components that t-SNE works on, as its authors advise
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(SourceConfig):
    """How representations are laid out in the plane."""

    method: Literal["tsne", "pca"] = "tsne"
    """t-SNE, or the first two principal components."""
    num_images: int | None = None
    """About so many are shown, as many of each class; null: 2000, or as many as the smallest class allows."""
    classes: tuple[str, ...] = ()
    """Names of those that are shown; by default all, or 20 at equal distances where there are more."""
    perplexity: float = 30.0
    """Of t-SNE: about how many neighbours each image has."""

    def __post_init__(self) -> None:
        if not self.perplexity > 0.0:
            raise ValueError(f"`perplexity` must be positive, got {self.perplexity}")


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Where images lie, float64 [n, 2], and figures about it."""

    points: FloatArray
    figures: dict[str, Any]


def draw(config: EmbeddingConfig) -> Drawn:
    """Draw both representations of a balanced sample.

    Raises:
        ValueError: there are fewer images than asked, one class alone, no labels, or no projection head.
    """
    source = Source(config)
    check_head(source.network)
    classes = shown_classes(source.labels, config.classes, source.names)
    rows = balanced_rows(source.labels, classes, config.num_images, config.seed)
    if config.method == "tsne" and not config.perplexity < len(rows):
        raise ValueError(f"`perplexity` must be below the {len(rows)} images shown, got {config.perplexity}")
    labels = source.labels[rows]
    planes = {name: lay_out(values[rows], config) for name, values in zip("hz", source.both(), strict=True)}

    title = "t-SNE" if config.method == "tsne" else "Principal components"
    some = f"{len(classes)} of {source.num_classes} classes" if len(classes) < source.num_classes else ""
    sample = f"{len(rows):,} images, {len(rows) // len(classes)} of each class"
    figure = new_figure(
        11.0,
        5.6,
        f"{title} of representations, by class",
        "; ".join(part for part in (source.words(), sample, some) if part),
    )
    panels = figure.subplots(1, 2)
    for panel, (name, plane) in zip(panels, planes.items(), strict=True):
        _draw_panel(panel, name, plane, labels, classes, source.names, config.method)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right upper", markerscale=1.8)
    numbers = source.about() | {
        "picture": "embedding",
        "method": config.method,
        "perplexity": config.perplexity if config.method == "tsne" else None,
        "classes": {str(label): source.names[label] for label in classes},
        "figures": {name: plane.figures for name, plane in planes.items()},
        "rows": rows.tolist(),
        "labels": labels.tolist(),
        "points": {name: plane.points.tolist() for name, plane in planes.items()},
    }
    return Drawn(figure=figure, numbers=numbers, folder=source.folder, name=f"embedding-{config.method}")


def lay_out(values: NDArray[np.float32], config: EmbeddingConfig) -> Plane:
    """Representations [n, D] in the plane."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.where(norms > 0.0, norms, 1.0)
    with threadpool_limits(limits=1):  # else sums over threads differ in their last digit, and t-SNE enlarges it
        num_components = 2 if config.method == "pca" else min(TSNE_DIMS, *unit.shape)
        pca = PCA(num_components, svd_solver="full").fit(unit.astype(np.float64))
        components = pca.transform(unit.astype(np.float64))
        shares = pca.explained_variance_ratio_[:2].tolist()
        if config.method == "pca":
            return Plane(points=components, figures={"variance_shares": shares})
        tsne = TSNE(perplexity=config.perplexity, init="pca", random_state=config.seed, n_jobs=1)
        points = tsne.fit_transform(components)
    return Plane(points=points.astype(np.float64), figures={"kl_divergence": float(tsne.kl_divergence_)})


def _draw_panel(
    panel: Axes,
    name: str,
    plane: Plane,
    labels: NDArray[np.int64],
    classes: list[int],
    names: list[str],
    method: str,
) -> None:
    for i, label in enumerate(classes):
        x, y = plane.points[labels == label].T
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        name_of_class = shortened(names[label], 24)
        panel.scatter(x, y, s=10, linewidths=0.0, alpha=0.75, label=name_of_class, color=color, marker=marker)
    what = {"h": "h, the encoder's output", "z": "z = g(h), the projection"}[name]
    panel.set_title(what)
    if method == "pca":
        first, second = plane.figures["variance_shares"]
        panel.set(
            xlabel=f"component 1 ({100 * first:.1f} % of variance)",
            ylabel=f"component 2 ({100 * second:.1f} %)",
        )
    else:
        panel.set(xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)", xticks=[], yticks=[])
    panel.set_aspect("equal", adjustable="datalim")
