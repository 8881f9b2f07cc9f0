"""A metric over many lines, drawn with few points, and nothing hidden.

Each point is the mean of its neighbours, and the lowest and the highest of them go with it.

Legend: n values as they were written, m points that are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
MOST_POINTS = 240  # of a line: more lie closer than the width of a stroke
LARGEST = 1e300  # differences of larger numbers are not finite


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A line of a chart: float64 [m], NaN in `mean` where it is broken."""

    label: str
    x: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    values_per_point: int
    """As many were taken together, at most; 1: every value is drawn."""
    last: float
    """The last value that is finite, by itself; NaN without one."""
    num_left_out: int
    """Values that are no finite numbers, and so on no axis."""


def reduced(
    label: str, x: FloatArray, values: FloatArray, *, breaks: Sequence[int] = (), most: int = MOST_POINTS
) -> Series:
    """A series of at most about `most` points.

    Args:
        label: of the line.
        x: rising, float64 [n].
        values: float64 [n], any.
        breaks: positions before which the line is broken, rising.
        most: points.
    """
    per_point = max(1, math.ceil(len(x) / most))
    columns: list[tuple[float, float, float, float]] = []
    for part in np.split(np.arange(len(x)), list(breaks)):
        if len(part) == 0:
            continue
        if columns:
            columns.append((float(x[part[0]]), math.nan, math.nan, math.nan))
        for few in np.array_split(part, math.ceil(len(part) / per_point)):
            columns.append(_point(x[few], values[few]))
    drawn = np.array(columns, np.float64).reshape(-1, 4)
    is_finite = np.isfinite(values)
    return Series(
        label=label,
        x=drawn[:, 0],
        mean=drawn[:, 1],
        low=drawn[:, 2],
        high=drawn[:, 3],
        values_per_point=per_point,
        last=float(values[is_finite][-1]) if is_finite.any() else math.nan,
        num_left_out=int((~is_finite).sum()),
    )


def _point(x: FloatArray, values: FloatArray) -> tuple[float, float, float, float]:
    finite = np.clip(values[np.isfinite(values)], -LARGEST, LARGEST)
    if len(finite) == 0:
        return float(x.mean()), math.nan, math.nan, math.nan
    mean = float((finite / len(finite)).sum())
    return float(x.mean()), mean, float(finite.min()), float(finite.max())
