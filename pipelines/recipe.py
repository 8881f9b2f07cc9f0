"""Augmentation recipes: what is drawn for each view, as ranges and probabilities.

A recipe is data. `pipelines.params` draws from it, and the loaders and the photometric chain apply what was drawn,
always in the order crop → flip → rotate → jitter → gray → blur → solarize → sobel → noise → cutout → normalise.
`pipelines.augment` has the published recipes.

Sources: SimCLR v1, figure 4 and appendix A, and its released data_util.py; torchvision's transforms for the meaning of
each factor.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

BLUR_SIGMA = (0.1, 2.0)  # SimCLR v1, appendix A

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What is drawn for one view. Probabilities in [0, 1]; jitter factors in torchvision's convention."""

    size: int
    """Side of the square view, pixels."""
    crop: Literal["random_resized", "center", "whole"] = "random_resized"
    """`center` takes the largest central square, and `whole` everything, whatever its aspect; they draw nothing."""
    shared_crop: bool = False
    """First cut a random window that is the same for all views of the image; `crop` then chooses within it."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of the window's area, as a share of the image's."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the window's width / height, drawn uniformly in its logarithm."""
    interpolation: Interpolation = "bilinear"
    """The filter that resizes the window, antialiased: a triangle, or Keys' cubic with a = −1/2."""
    flip_prob: float = 0.0
    rotate_prob: float = 0.0
    """Probability of one, two or three quarter turns, each as likely."""
    jitter_prob: float = 0.0
    """Probability that brightness, contrast, saturation and hue are changed, in a random order."""
    brightness: float = 0.0
    """Factor from U[max(0, 1 − b), 1 + b]; likewise contrast and saturation."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Shift from U[−h, h], as a share of the colour circle."""
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = BLUR_SIGMA
    """Range of the Gaussian's standard deviation, pixels of the view."""
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5
    """Values at or above it are inverted; on the scale [0, 1]."""
    sobel_prob: float = 0.0
    """Probability that the view is replaced by the magnitude of its luma's Sobel gradient."""
    noise_prob: float = 0.0
    """Probability of additive Gaussian noise, clipped to [0, 1]."""
    noise_std: tuple[float, float] = (0.0, 0.2)
    """Range of its standard deviation, on the scale [0, 1]."""
    cutout_prob: float = 0.0
    """Probability that a square is filled with the mean colour (0 after normalisation)."""
    cutout_side: float = 0.5
    """Side of the square, as a share of the view's; its centre is uniform over the pixels, and it may overhang."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`size` of a view must be at least 1 pixel, got {self.size}")
        _check_range("crop_area", self.crop_area, 0.0, 1.0)
        _check_range("crop_aspect", self.crop_aspect, 0.0, float("inf"))
        _check_range("blur_sigma", self.blur_sigma, 0.0, float("inf"))
        for name in (field.name for field in fields(self) if field.name.endswith("_prob")):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be a probability in [0, 1], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"`hue` must be in [0, 0.5] of the colour circle, got {self.hue}")
        if not 0.0 <= self.noise_std[0] <= self.noise_std[1]:
            raise ValueError(f"`noise_std` must be a rising range from 0, got {list(self.noise_std)}")
        if self.sobel_prob > 0.0 and self.size < 2:
            raise ValueError(f"`sobel_prob` must be 0 for a view of 1 pixel, got {self.sobel_prob}")
        if not 0.0 < self.cutout_side <= 1.0:
            raise ValueError(f"`cutout_side` must be a share of the view's side in (0, 1], got {self.cutout_side}")

    @property
    def blur_kernel(self) -> int:
        """Width of the blur's kernel: a tenth of the side, made odd as in google's code (23 at 224 pixels)."""
        return 2 * (self.size // 10 // 2) + 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The views of one image, and the normalisation that all of them share."""

    views: tuple[ViewRecipe, ...]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from each channel, on the scale [0, 1]; google's SimCLR does not normalise."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if not self.views:
            raise ValueError("`views` must hold at least one view")
        if min(self.std) <= 0.0:
            raise ValueError(f"`std` must be positive, got {self.std}")


def _check_range(name: str, bounds: tuple[float, float], low: float, high: float) -> None:
    if not low < bounds[0] <= bounds[1] <= high:
        raise ValueError(f"`{name}` must be a rising range within ({low}, {high}], got {list(bounds)}")
