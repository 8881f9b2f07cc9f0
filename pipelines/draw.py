"""Draw the parameters of views.

The drawing itself is compiled (`pipelines.draw_numba`), so that decoding threads do it too; `pipelines.draw_reference`
defines it.

Legend: N samples, V views.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.draw_numba import draw_kernel
from pipelines.params import VIEW_PARAMS, ViewParams, recipe_table
from pipelines.recipe import Recipe
from pipelines.rng import key_of


def draw_views(
    recipe: Recipe,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    widths: NDArray[np.int32],
    heights: NDArray[np.int32],
) -> ViewParams:
    """Draw the parameters of all views of some samples.

    Args:
        recipe: what to draw.
        seed: of the run.
        epoch: from 0.
        samples: int64 [N], rows of the `.beton`.
        widths: int32 [N], of the stored images, pixels.
        heights: int32 [N].

    Returns:
        `VIEW_PARAMS` [N, V].
    """
    params = np.zeros((len(samples), len(recipe.views)), VIEW_PARAMS)
    draw_kernel()(recipe_table(recipe), key_of(seed, epoch)[0], samples, widths, heights, params)
    return params
