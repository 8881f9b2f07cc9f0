"""Galleries: images drawn by chance, and beside each those nearest to it by cosine, marked right or wrong by class.

Queries come from the classes in turn, by the seed, and nobody chooses the nice ones. An image is not its own neighbour.

Legend: n images, D width of a representation, Q queries, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.rng import key_of
from tools.pictures_canvas import RIGHT, WRONG, Drawn, new_figure, shortened
from tools.pictures_source import H, Source, SourceConfig, Z
from tools.preview_sheet import INK
from train.evaluation.knn import nearest

TILE = 160  # pixels: larger images are reduced to it, smaller ones keep their own


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig(SourceConfig):
    """Which galleries are shown."""

    space: Literal["h", "z"] = "h"
    """Near by the encoder's output, or by the projection."""
    num_queries: int = 10
    """Rows of the picture."""
    k: int = 8
    """Neighbours of each."""

    def __post_init__(self) -> None:
        for name in ("num_queries", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")


def draw(config: NeighboursConfig) -> Drawn:
    """Draw the galleries.

    Raises:
        ValueError: there are fewer images than asked, one class alone, or no labels; or no head for `space` z.
    """
    source = Source(config)
    num_images = len(source.labels)
    for name, most in (("num_queries", num_images), ("k", num_images - 1)):
        if getattr(config, name) > most:
            raise ValueError(f"`{name}` must be at most {most}, as {config.test_data} has, got {getattr(config, name)}")
    values = source.features("test", H if config.space == "h" else Z).values
    queries = choose_queries(source.labels, config.num_queries, config.seed)
    neighbours, cosines = nearest_others(values, queries, config.k)
    right = source.labels[neighbours] == source.labels[queries][:, None]

    space = {"h": "h, the encoder's output", "z": "z = g(h), the projection"}[config.space]
    share = f"{100 * right.mean():.0f} % of the neighbours shown are of the query's class"
    figure = new_figure(
        max(6.6, 1.5 + 1.12 * (config.k + 1)),
        1.3 + 1.5 * config.num_queries,
        f"Nearest neighbours by cosine in {space}",
        f"{source.words()}, {num_images:,} images; queries drawn by chance; {share}",
    )
    ratios = [1.0, 0.12, *[1.0] * config.k]  # a gap between the query and the others
    panels = figure.subplots(config.num_queries, config.k + 2, squeeze=False, gridspec_kw={"width_ratios": ratios})
    for i, query in enumerate(queries.tolist()):
        row_of_panels = panels[i].tolist()
        _show(row_of_panels[0], source.image(query), source.names[source.labels[query]], INK, "query" if i == 0 else "")
        row_of_panels[1].set_visible(False)
        for panel, other, cosine, is_right in zip(
            row_of_panels[2:], neighbours[i].tolist(), cosines[i].tolist(), right[i].tolist(), strict=True
        ):
            name = "✓" if is_right else f"✗ {source.names[source.labels[other]]}"
            _show(panel, source.image(other), name, RIGHT if is_right else WRONG, f"{cosine:.2f}")
    numbers = source.about() | {
        "picture": "neighbours",
        "space": config.space,
        "num_images": num_images,
        "share_right": float(right.mean()),
        "queries": [
            _numbers(source, *one) for one in zip(queries.tolist(), neighbours.tolist(), cosines.tolist(), strict=True)
        ],
    }
    return Drawn(figure=figure, numbers=numbers, folder=source.folder, name=f"neighbours-{config.space}")


def choose_queries(labels: NDArray[np.int64], num_queries: int, seed: int) -> NDArray[np.int64]:
    """Rows by chance, one of each class in turn: int64 [Q], by class, then by row."""
    order = np.argsort(key_of(seed, np.arange(len(labels))), kind="stable")
    turns = np.empty(len(labels), np.int64)  # how many of its class come before an image
    for label in np.unique(labels):
        members = order[labels[order] == label]
        turns[members] = np.arange(len(members))
    chosen = order[np.argsort(turns[order], kind="stable")][:num_queries]
    by_class: NDArray[np.int64] = chosen[np.lexsort((chosen, labels[chosen]))]
    return by_class


def nearest_others(values: Tensor, queries: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k rows nearest to each query by cosine, without itself, nearest first, and their cosines: both [Q, k].

    Of equally near ones the first rows.
    """
    cosines, found = (part.numpy() for part in nearest(values, values[torch.from_numpy(queries)], k + 1))
    others = found != queries[:, None]
    others[others.all(axis=1), -1] = False  # so many copies come before it that it is not among them
    shape = len(queries), k
    return found[others].reshape(shape), cosines[others].reshape(shape).astype(np.float64)


def _show(panel: Axes, image: Image.Image, below: str, color: str, above: str) -> None:
    if image.width > TILE:
        image = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
    panel.imshow(np.asarray(image), interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.grid(visible=False)
    panel.set_title(above, fontsize=8, loc="center", pad=3)
    panel.set_xlabel(shortened(below, 14), fontsize=8, color=color, labelpad=3)
    for spine in panel.spines.values():
        spine.set(visible=True, color=color, linewidth=2.5, linestyle="--" if color == WRONG else "-")


def _numbers(source: Source, query: int, neighbours: list[int], cosines: list[float]) -> dict[str, Any]:
    return {
        "row": query,
        "class": source.names[source.labels[query]],
        "neighbours": [
            {"row": row, "class": source.names[source.labels[row]], "cosine": cosine}
            for row, cosine in zip(neighbours, cosines, strict=True)
        ],
    }
