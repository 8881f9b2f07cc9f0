"""Augmentation recipes: what is drawn for each view, as ranges and probabilities.

A recipe is data. `pipelines.params` draws from it, and the loaders and the photometric chain apply what was drawn,
always in the order crop → flip → jitter → gray → blur → solarize → normalise.

Sources: SimCLR v1, appendix A, and its released data_util.py; torchvision's transforms for the meaning of each factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BLUR_SIGMA = (0.1, 2.0)  # SimCLR v1, appendix A


@dataclass(frozen=True, kw_only=True)
class ViewRecipe:
    """What is drawn for one view. Probabilities in [0, 1]; jitter factors in torchvision's convention."""

    size: int
    """Side of the square view, pixels."""
    crop: Literal["random_resized", "center"] = "random_resized"
    """`center` takes the largest central window of the output's aspect, and draws nothing."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of the window's area, as a share of the image's."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the window's width / height, drawn uniformly in its logarithm."""
    flip_prob: float = 0.0
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

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"`size` of a view must be at least 1 pixel, got {self.size}")
        _check_range("crop_area", self.crop_area, 0.0, 1.0)
        _check_range("crop_aspect", self.crop_aspect, 0.0, float("inf"))
        _check_range("blur_sigma", self.blur_sigma, 0.0, float("inf"))
        for name in ("flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be a probability in [0, 1], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"`hue` must be in [0, 0.5] of the colour circle, got {self.hue}")

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


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The augmentation of a run: a named recipe and its strength."""

    recipe: Literal["simclr", "supervised"] = "simclr"
    """`simclr`: two views, crop, flip, colour distortion, blur. `supervised`: one view, crop and flip."""
    size: int = 224
    """Side of the views, pixels."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a share of the image's."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip (0 where mirror images mean something else, as for digits)."""
    color_strength: float = 1.0
    """SimCLR's s: 1 on ImageNet, 0.5 on CIFAR-10."""
    blur_prob: float = 0.5
    """Probability of a Gaussian blur: 0.5 on ImageNet, 0 on CIFAR-10."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from each channel, on the scale [0, 1]."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Each channel is divided by it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.color_strength <= 2.5:
            raise ValueError(
                f"`augment.color_strength` must be in [0, 2.5] (hue = 0.2·s ≤ 0.5), got {self.color_strength}"
            )
        build_recipe(self)


def build_recipe(config: AugmentConfig) -> Recipe:
    """The recipe that a configuration names."""
    view = (simclr_view if config.recipe == "simclr" else supervised_view)(config)
    num_views = 2 if config.recipe == "simclr" else 1
    return Recipe(views=(view,) * num_views, mean=config.mean, std=config.std)


def simclr_view(config: AugmentConfig) -> ViewRecipe:
    """SimCLR's view (v1, appendix A): jitter 0.8s, 0.8s, 0.8s, 0.2s with probability 0.8; gray with 0.2."""
    s = config.color_strength
    return ViewRecipe(
        size=config.size,
        crop_area=config.crop_area,
        flip_prob=config.flip_prob,
        jitter_prob=0.8,
        brightness=0.8 * s,
        contrast=0.8 * s,
        saturation=0.8 * s,
        hue=0.2 * s,
        gray_prob=0.2,
        blur_prob=config.blur_prob,
    )


def supervised_view(config: AugmentConfig) -> ViewRecipe:
    """Random crop and flip alone."""
    return ViewRecipe(size=config.size, crop_area=config.crop_area, flip_prob=config.flip_prob)


def center_recipe(config: AugmentConfig) -> Recipe:
    """One view for evaluation: the largest central square, resized; normalised as in training."""
    return Recipe(views=(ViewRecipe(size=config.size, crop="center"),), mean=config.mean, std=config.std)


def _check_range(name: str, bounds: tuple[float, float], low: float, high: float) -> None:
    if not low < bounds[0] <= bounds[1] <= high:
        raise ValueError(f"`{name}` must be a rising range within ({low}, {high}], got {list(bounds)}")
