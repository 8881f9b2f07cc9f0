"""What was drawn for a view, in words."""

from __future__ import annotations

import math

import numpy as np

from pipelines.params import BRIGHTNESS, CONTRAST, HUE, NO_OP, SATURATION
from pipelines.recipe import ViewRecipe

_TURNS = {1: "turned 90° left", 2: "turned 180°", 3: "turned 90° right"}
_FACTORS = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation"}


def describe(params: np.void, view: ViewRecipe) -> list[str]:
    """Each step of a view, in the order of its application.

    Args:
        params: `VIEW_PARAMS`, of one view.
        view: its recipe.

    Returns:
        At least two phrases: the window, and what happened to it. Sizes are width × height, places are (x, y) of the
        upper left corner, all in pixels.
    """
    steps = [
        f"window {params['width']} × {params['height']} at ({params['left']}, {params['top']})",
        "mirrored" if params["flip"] else "",
        _TURNS.get(int(params["quarter_turns"]), ""),
        " → ".join(_jitter(int(op), params["jitter_factor"]) for op in params["jitter_order"] if op != NO_OP),
        "gray" if params["gray"] else "",
        f"blur σ {params['blur_sigma']:.2f} px, kernel {view.blur_kernel}" if params["blur_sigma"] > 0 else "",
        f"solarized from {params['solarize_threshold']:.2f}" if math.isfinite(params["solarize_threshold"]) else "",
        "Sobel edges" if params["sobel"] else "",
        f"noise σ {params['noise_std']:.3f}" if params["noise_std"] > 0 else "",
        _cutout(params),
    ]
    said = [step for step in steps if step]
    return said if len(said) > 1 else [*said, "nothing else"]


def _jitter(op: int, factors: np.ndarray) -> str:
    if op == HUE:
        return f"hue {360 * factors[op]:+.0f}°".replace("-", "−")
    return f"{_FACTORS[op]} ×{factors[op]:.2f}"


def _cutout(params: np.void) -> str:
    width, height = params["cutout_width"], params["cutout_height"]
    if height == 0:
        return ""
    return f"cutout {width} × {height} at ({params['cutout_left']}, {params['cutout_top']})"
