"""The cells of each study: what a row and a column change in the base configuration, and which there are by default.

Where the paper's own values would not fit a small machine (batch sizes, epochs, networks), the default values are those
of the base configuration, multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

from model.resnet import BASIC_DEPTHS, NUM_BLOCKS
from pipelines.augment import Transformation
from tools.study_grid import ONLY, Axis, Cell
from train.config import PretrainConfig
from train.optim.lars import peak_lr

TRANSFORMATIONS: tuple[str, ...] = get_args(Transformation)
STRENGTHS = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}
BLURRED = "1 (+blur)"
NO_HEAD, LINEAR_HEAD, NONLINEAR_HEAD = "none", "linear", "non-linear"
HEAD_LAYERS = {LINEAR_HEAD: 1, NONLINEAR_HEAD: 2}
WIDTHS = ("32", "64", "128", "256", "512", "1024", "2048")
LOSSES: dict[str, tuple[str, bool]] = {
    "NT-Xent": ("nt_xent", False),
    "NT-Logistic": ("nt_logistic", False),
    "NT-Logistic (semi-hard)": ("nt_logistic", True),
    "Margin": ("margin_triplet", False),
    "Margin (semi-hard)": ("margin_triplet", True),
}
UNNORMALIZED = "not normalised, "
PREDICTED: dict[str, tuple[str, ...]] = {
    "color_vs_grayscale": (),
    "rotation": ("rotate",),
    "original_vs_corrupted": ("noise",),
    "original_vs_sobel": ("sobel",),
}
"""Tasks of table 3, and what each adds to the recipe of pretraining."""
SIMCLR, SUPERVISED = "SimCLR", "supervised"


def fixed(rows: tuple[str, tuple[str, ...]], columns: tuple[str, tuple[str, ...]]) -> Any:
    """Axes that do not depend on the base."""
    axes = (Axis(name=rows[0], values=rows[1]), Axis(name=columns[0], values=columns[1]))
    return lambda _: axes


def _number(label: str, what: str, kind: Callable[[str], Any] = float) -> Any:
    try:
        value = kind(label)
    except ValueError:
        value = 0
    if not value > 0 or not math.isfinite(value):
        raise ValueError(f"{what} must be a positive number, got {label!r}")
    return value


def _member(label: str, what: str, known: tuple[str, ...]) -> str:
    if label not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {label!r}")
    return label


def composition_cell(_: PretrainConfig, row: str, column: str) -> Cell:
    """One or two transformations on one branch."""
    for label in (row, column):
        _member(label, "a transformation of composition", TRANSFORMATIONS)
    both = tuple(name for name in TRANSFORMATIONS if name in (row, column))
    overrides: dict[str, Any] = {"augment.recipe": "one_branch", "augment.branch_transformations": both}
    if "blur" in both:
        overrides["augment.blur_prob"] = None
    return Cell(row=row, column=column, overrides=overrides)


def color_cell(_: PretrainConfig, row: str, column: str) -> Cell:
    """A strength of the colour distortion, with blur in the last column."""
    _member(row, "a row of color", (SIMCLR,))
    return Cell(row=row, column=column, overrides={"augment.recipe": "simclr", **_distortion(column)})


def _distortion(column: str) -> dict[str, Any]:
    strength = 1.0 if column == BLURRED else STRENGTHS.get(column) or _number(column, "a colour strength")
    return {"augment.color_strength": strength, "augment.blur_prob": 0.5 if column == BLURRED else 0.0}


def supervised_cells(columns: Sequence[str], num_classes: int) -> list[Cell]:
    """Table 1's second row: the same network, trained with labels under the same distortions."""
    common = {
        "model.method": "supervised",
        "model.classifier.num_classes": num_classes,
        "augment.recipe": "supervised_color",
    }
    return [
        Cell(row=SUPERVISED, column=column, overrides=common | _distortion(column), measure="network")
        for column in columns or (*STRENGTHS, BLURRED)
    ]


def head_cell(base: PretrainConfig, row: str, column: str) -> Cell | None:
    """A head and the dimension of its output."""
    _member(row, "a head", (NO_HEAD, *HEAD_LAYERS))
    dim = _number(column, "an output dimension", int)
    if row == NO_HEAD:  # the loss is then computed on h itself, whose width no head changes: one cell
        own = feature_dim(base)
        return Cell(row=row, column=column, overrides={"model.projection_head.num_layers": 0}) if dim == own else None
    return Cell(
        row=row,
        column=column,
        overrides={"model.projection_head.num_layers": HEAD_LAYERS[row], "model.projection_head.out_dim": dim},
    )


def feature_dim(base: PretrainConfig) -> int:
    """Width of the encoder's representation h."""
    encoder = base.model.encoder
    return int(8 * 64 * encoder.width) * (1 if encoder.depth in BASIC_DEPTHS else 4)


def head_axes(base: PretrainConfig) -> tuple[Axis, Axis]:
    """The paper's, and the encoder's own width, which is that of no head."""
    widths = sorted({*map(int, WIDTHS), feature_dim(base)})
    return (
        Axis(name="head", values=(NO_HEAD, *HEAD_LAYERS)),
        Axis(name="output dimension", values=tuple(map(str, widths))),
    )


def transform_cell(base: PretrainConfig, row: str, column: str) -> Cell:
    """The paper's h and z are of the same width."""
    _member(row, "a row of transform_prediction", tuple(PREDICTED))
    _member(column, "a column of transform_prediction", (ONLY,))
    overrides = {
        "augment.extra_transformations": PREDICTED[row],
        "model.projection_head.out_dim": feature_dim(base),
    }
    return Cell(row=row, column=column, overrides=overrides, measure="transformation")


def loss_cell(base: PretrainConfig, row: str, column: str) -> Cell:
    """A loss, with the base's temperature or margin."""
    _member(row, "a loss", tuple(LOSSES))
    _member(column, "a column of losses", (ONLY,))
    name, semi_hard = LOSSES[row]
    margin = base.model.margin if name == "margin_triplet" else None
    overrides = {"model.loss": name, "model.semi_hard": semi_hard, "model.margin": margin}
    if name == "margin_triplet":
        overrides["model.learn_temperature"] = False
    return Cell(row=row, column=column, overrides=overrides)


def temperature_cell(_: PretrainConfig, row: str, column: str) -> Cell:
    """A temperature, with or without normalisation."""
    _member(column, "a column of temperature", (ONLY,))
    normalize = not row.startswith(UNNORMALIZED)
    temperature = _number(row.removeprefix(UNNORMALIZED), "a temperature")
    return Cell(
        row=row,
        column=column,
        overrides={"model.loss": "nt_xent", "model.temperature": temperature, "model.normalize": normalize},
    )


def _batch_sizes(base: PretrainConfig) -> tuple[str, ...]:
    batch = base.data.global_batch_size
    return tuple(str(size) for size in sorted({max(2, batch // 4), max(2, batch // 2), batch, 2 * batch}))


def batch_epochs_axes(base: PretrainConfig) -> tuple[Axis, Axis]:
    """Multiples of the base's."""
    epochs = base.train.epochs
    counts = sorted({max(1, epochs // 2), epochs, 2 * epochs})
    return (
        Axis(name="batch size", values=_batch_sizes(base)),
        Axis(name="epochs", values=tuple(map(str, counts))),
    )


def batch_epochs_cell(_: PretrainConfig, row: str, column: str) -> Cell:
    """A batch size and a number of epochs; the rate follows the batch by the base's rule."""
    overrides = {
        "data.global_batch_size": _number(row, "a batch size", int),
        "train.epochs": _number(column, "a number of epochs", int),
    }
    return Cell(row=row, column=column, overrides=overrides)


def width_axes(base: PretrainConfig) -> tuple[Axis, Axis]:
    """All depths of the base's kind of block, and multiples of its width."""
    encoder = base.model.encoder
    family = [depth for depth in NUM_BLOCKS if (depth in BASIC_DEPTHS) == (encoder.depth in BASIC_DEPTHS)]
    return (
        Axis(name="depth", values=tuple(map(str, family))),
        Axis(name="width", values=tuple(f"{encoder.width * factor:g}" for factor in (1, 2, 4))),
    )


def width_cell(base: PretrainConfig, row: str, column: str) -> Cell:
    """An encoder."""
    depth = _number(row, "a depth", int)
    overrides: dict[str, Any] = {"model.encoder.depth": depth, "model.encoder.width": _number(column, "a width")}
    if depth in BASIC_DEPTHS and base.model.encoder.selective_kernel:
        overrides["model.encoder.selective_kernel"] = False
    return Cell(row=row, column=column, overrides=overrides)


def lr_axes(base: PretrainConfig) -> tuple[Axis, Axis]:
    """Multiples of the base's batch size, under both rules."""
    return (
        Axis(name="batch size", values=_batch_sizes(base)),
        Axis(name="learning rate", values=("linear", "sqrt")),
    )


def lr_cell(base: PretrainConfig, row: str, column: str) -> Cell:
    """Both rules give the base's peak rate at the base's batch size."""
    _member(column, "a scaling of the learning rate", ("linear", "sqrt"))
    batch = base.data.global_batch_size
    peak = peak_lr(base.optim, batch)
    base_lr = peak * 256 / batch if column == "linear" else peak / math.sqrt(batch)
    return Cell(
        row=row,
        column=column,
        overrides={
            "data.global_batch_size": _number(row, "a batch size", int),
            "optim.lr_scaling": column,
            "optim.base_lr": base_lr,
        },
    )
