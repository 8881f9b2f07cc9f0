"""The spectrum of the projection head, as SimCLR v1's figure B.3, and of the covariances of h and z.

The paper plots the squared real eigenvalues of the matrix W of a linear head z = W h, 2048 × 2048, on a uniform and on
a logarithmic scale, and finds that it is "approximately low-ranked". Here W is that of the head's first layer, by
itself, without its batch norm. A matrix that is not square has no eigenvalues: its squared singular values stand in,
and the picture says so. Squared singular values are shown for every layer besides.

The effective rank is exp of the entropy of eigenvalues as shares of their sum (Roy & Vetterli 2007): of a covariance,
in how many directions representations spread.

Legend: n images, D width of h, E width of z; W is [out, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tools.pictures_canvas import COLORS, Drawn, new_figure
from tools.pictures_source import Source, SourceConfig, about, check_head, folder_of, words
from train.checkpoint import load_checkpoint
from train.evaluation.representation import Network, build_network
from train.initial_encoder import find_checkpoint

LINES = ("-", "--", "-.", ":")
FLOOR = 1e-10  # of the largest: below it lies the rounding of float32
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SpectrumConfig(SourceConfig):
    """Whose spectrum is shown."""

    test_data: str = ""
    """A labelled set, whose h and z are looked at; without one, the head alone."""


def draw(config: SpectrumConfig) -> Drawn:
    """Draw the spectra.

    Raises:
        ValueError: the checkpoint holds no whole projection head, or the set cannot be used.
    """
    source = Source(config) if config.test_data else None
    path = find_checkpoint(Path(config.checkpoint), config.which)
    checkpoint = load_checkpoint(path)
    network = source.network if source else build_network("learned", checkpoint, weights=config.weights, source=path)
    check_head(network)
    matrices = dense_weights(network)
    first, is_square = matrices[0], matrices[0].shape[0] == matrices[0].shape[1]
    eigenvalues = squared_real_eigenvalues(first) if is_square else squared_singular_values(first)
    singular = [squared_singular_values(matrix) for matrix in matrices]
    covariances = {}
    if source:
        covariances = {name: covariance_spectrum(values) for name, values in zip("hz", source.both(), strict=True)}

    kind = "squared real parts of eigenvalues" if is_square else "squared singular values (not square)"
    rows, columns = (2, 2) if covariances else (1, 3)
    size = (11.0, 8.2) if covariances else (14.0, 4.6)
    figure = new_figure(*size, "Spectrum of the projection head", words(config, path, checkpoint))
    uniform, logarithmic, layers, *rest = figure.subplots(rows, columns).flatten().tolist()
    shape = f"{first.shape[0]} × {first.shape[1]}"
    for panel, scale in ((uniform, "linear"), (logarithmic, "log")):
        panel.plot(*_ranked(eigenvalues), color=COLORS[0], linewidth=1.8)
        panel.set(xlabel="rank", ylabel=kind, yscale=scale, title=f"Layer 1, W {shape}, {scale} scale")
    _draw_layers(layers, singular, matrices)
    for spread in rest:
        _draw_covariances(spread, covariances)
    numbers = about(config, path, checkpoint) | {
        "picture": "spectrum",
        "first_layer": {
            "shape": list(first.shape),
            "values_are": "squared real parts of eigenvalues" if is_square else "squared singular values",
            "values": eigenvalues.tolist(),
        },
        "squared_singular_values": [
            {"layer": k + 1, "shape": list(matrix.shape), "effective_rank": effective_rank(values)}
            | {"values": values.tolist()}
            for k, (matrix, values) in enumerate(zip(matrices, singular, strict=True))
        ],
        "covariance": {
            name: {"effective_rank": effective_rank(values), "eigenvalues": values.tolist()}
            for name, values in covariances.items()
        },
    }
    return Drawn(figure=figure, numbers=numbers, folder=folder_of(config, path), name="spectrum")


def dense_weights(network: Network) -> list[FloatArray]:
    """W of each layer of the head, float64 [out, in]."""
    weights = [layer.get_parameter("0.weight") for layer in network.head]
    return [weight.detach().double().cpu().numpy() for weight in weights]


def squared_real_eigenvalues(matrix: FloatArray) -> FloatArray:
    """(Re λ)² of a square matrix, largest first."""
    squared: FloatArray = np.sort(np.linalg.eigvals(matrix).real ** 2)[::-1]
    return squared


def squared_singular_values(matrix: FloatArray) -> FloatArray:
    """σ² of a matrix, largest first."""
    squared: FloatArray = np.linalg.svd(matrix, compute_uv=False).astype(np.float64) ** 2
    return squared


def covariance_spectrum(values: NDArray[np.float32]) -> FloatArray:
    """Eigenvalues of the covariance of representations [n, D], each scaled to length 1; largest first, none below 0.

    Scaled, as in training's `projection_rank`: the loss sees directions alone.
    """
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    unit = (values / np.where(norms > 0.0, norms, 1.0)).astype(np.float64)
    eigenvalues: FloatArray = np.linalg.eigvalsh(np.atleast_2d(np.cov(unit, rowvar=False))).astype(np.float64)
    return eigenvalues[::-1].clip(min=0.0)


def effective_rank(eigenvalues: FloatArray) -> float:
    """Exp of the entropy of eigenvalues ≥ 0 as shares of their sum; 0 where all are 0."""
    total = eigenvalues.sum()
    if total <= 0.0:
        return 0.0
    shares = eigenvalues[eigenvalues > 0.0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _draw_layers(panel: Axes, singular: list[FloatArray], matrices: list[FloatArray]) -> None:
    for k, (values, matrix) in enumerate(zip(singular, matrices, strict=True)):
        label = f"layer {k + 1}, {matrix.shape[0]} × {matrix.shape[1]}, effective rank {effective_rank(values):.1f}"
        line, color = LINES[k % len(LINES)], COLORS[k % len(COLORS)]
        panel.plot(*_ranked(values / values[0]), line, color=color, linewidth=1.8, label=label)
    panel.set(yscale="log", xlabel="rank", ylabel="squared singular value / largest", title="Every layer's W")
    panel.legend(fontsize=8)


def _draw_covariances(panel: Axes, covariances: dict[str, FloatArray]) -> None:
    for i, (name, values) in enumerate(covariances.items()):
        label = f"{name}: {len(values)} wide, effective rank {effective_rank(values):.1f}"
        panel.plot(*_ranked(values / values.sum()), LINES[i], color=COLORS[i], linewidth=1.8, label=label)
    title = "Covariance of h/‖h‖ and z/‖z‖"
    panel.set(yscale="log", xlabel="rank", ylabel="share of the variance", title=title)
    panel.legend(fontsize=8)


def _ranked(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Rank from 1 and value, without what is rounding."""
    kept = values[values > FLOOR * values[0]]
    return np.arange(1, len(kept) + 1, dtype=np.float64), kept
