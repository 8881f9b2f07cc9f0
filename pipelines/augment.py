"""The published augmentation recipes, and the configuration that names one of them.

Sources, and what each states beyond SimCLR's ranges:

- `simclr`: SimCLR v1, appendix A: crop area (0.08, 1), jitter 0.8s, 0.8s, 0.8s, 0.2s with probability 0.8, gray with
  0.2, blur with 0.5.
- `moco_v2`: Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning", and its main_moco.py: crop area
  (0.2, 1), jitter 0.4, 0.4, 0.4, 0.1.
- `byol`: Grill et al. 2020, "Bootstrap Your Own Latent", table 6: jitter 0.4, 0.4, 0.2, 0.1; the first view is always
  blurred, the second with probability 0.1 and solarized with 0.2.
- `dino`: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", and its main_dino.py: two
  global views coloured as BYOL's, of areas (0.4, 1), and smaller local ones of areas (0.05, 0.4), blurred with 0.5.
- `supervised`: one view, random crop and flip; `supervised_color`: one view of SimCLR's (v1, table 1 and appendix B.3,
  supervised training with its colour distortion).
- `one_branch`: SimCLR v1, section 3.1 and figure 5: both views share one random crop; the transformations under study
  are applied to the first view, and the second is left as it is.

`extra_transformations` is SimCLR v1's table 3: "other than crop and color augmentation, we additionally and
independently add rotation (one of {0, 90, 180, 270}), Gaussian noise, and Sobel filtering transformation during the
pretraining".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.recipe import Interpolation, Recipe, ViewRecipe

Transformation = Literal["crop", "cutout", "color", "sobel", "noise", "blur", "rotate"]
ExtraTransformation = Literal["rotate", "noise", "sobel"]

EXTRA: dict[ExtraTransformation, dict[str, Any]] = {
    "rotate": {"rotate_prob": 0.75},  # 0, 90, 180 and 270 degrees alike
    "noise": {"noise_prob": 0.5},
    "sobel": {"sobel_prob": 0.5},
}
"""What each changes in a view: as often applied as not, since guessing is right half the time (table 3)."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """The augmentation of a run: a named recipe and its strength."""

    recipe: Literal["simclr", "moco_v2", "byol", "dino", "supervised", "supervised_color", "one_branch"] = "simclr"
    """`simclr`, `moco_v2`, `byol` (asymmetric): two views. `dino`: two and `local_views` smaller ones. `supervised`:
    one view, crop and flip; `supervised_color`: one view of SimCLR's. `one_branch`: one crop twice,
    `branch_transformations` applied to the first alone."""
    size: int = 224
    """Side of the views, pixels."""
    interpolation: Interpolation = "bilinear"
    """The filter that resizes crops, antialiased; google's SimCLR, BYOL and DINO use `bicubic`."""
    crop_area: tuple[float, float] | None = None
    """Range of the crop's area, as a share of the image's; null: as published for the recipe."""
    flip_prob: float = 0.5
    """Probability of a horizontal flip (0 where mirror images mean something else, as for digits)."""
    color_strength: float = 1.0
    """Multiplies the recipe's jitter; SimCLR's s: 1 on ImageNet, 0.5 on CIFAR-10."""
    blur_prob: float | None = None
    """Probability of a Gaussian blur in every view: 0 for SimCLR on CIFAR-10; null: as published for the recipe."""
    local_views: int = 8
    """DINO's: small views beside the two large ones."""
    local_size: int = 96
    """DINO's: side of the small views, pixels."""
    local_crop_area: tuple[float, float] = (0.05, 0.4)
    """DINO's: range of the small views' crop area."""
    branch_transformations: tuple[Transformation, ...] = ("crop", "color")
    """Of `one_branch`: what the first view gets, always in the chain's order."""
    extra_transformations: tuple[ExtraTransformation, ...] = ()
    """Added to every view, each drawn by itself: `rotate` by a random number of quarter turns, `noise` and `sobel` with
    probability 0.5 each (SimCLR v1, table 3). Not with `one_branch`."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from each channel, on the scale [0, 1]."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Each channel is divided by it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.color_strength <= 2.5:
            raise ValueError(
                f"`augment.color_strength` must be in [0, 2.5] (hue = 0.2·s ≤ 0.5), got {self.color_strength}"
            )
        for name in ("local_views", "local_size", "local_crop_area"):
            self._check_unused(name, "dino")
        self._check_unused("branch_transformations", "one_branch")
        if len(set(self.branch_transformations)) < len(self.branch_transformations):
            raise ValueError(
                f"`augment.branch_transformations` must name each once, got {list(self.branch_transformations)}"
            )
        if len(set(self.extra_transformations)) < len(self.extra_transformations):
            raise ValueError(
                f"`augment.extra_transformations` must name each once, got {list(self.extra_transformations)}"
            )
        if self.extra_transformations and self.recipe == "one_branch":
            raise ValueError(
                "`augment.extra_transformations` would change the branch that one_branch leaves as it is, got "
                f"{list(self.extra_transformations)}; name them in `augment.branch_transformations`"
            )
        if self.local_views < 0:
            raise ValueError(f"`augment.local_views` must be 0 or more, got {self.local_views}")
        build_recipe(self)

    def _check_unused(self, name: str, recipe: str) -> None:
        """Refuse an option that would have no effect."""
        if self.recipe != recipe and getattr(self, name) != type(self).__dataclass_fields__[name].default:
            raise ValueError(f"`augment.{name}` needs `augment.recipe` {recipe}, got {self.recipe}")


def build_recipe(config: AugmentConfig) -> Recipe:
    """The recipe that a configuration names."""
    changes: dict[str, Any] = {}
    for name in config.extra_transformations:
        changes |= EXTRA[name]
    views = tuple(dataclasses.replace(view, **changes) for view in _VIEWS[config.recipe](config))
    return Recipe(views=views, mean=config.mean, std=config.std)


def center_recipe(config: AugmentConfig) -> Recipe:
    """One view for evaluation: the largest central square, resized; normalised as in training."""
    view = ViewRecipe(size=config.size, crop="center", interpolation=config.interpolation)
    return Recipe(views=(view,), mean=config.mean, std=config.std)


def supervised_view(config: AugmentConfig) -> ViewRecipe:
    """Random crop and flip alone."""
    return _cropped(config, (0.08, 1.0))


def _simclr(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    view = _colored(config, supervised_view(config), (0.8, 0.8, 0.8, 0.2), blur_prob=0.5)
    return (view, view)


def _moco_v2(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    view = _colored(config, _cropped(config, (0.2, 1.0)), (0.4, 0.4, 0.4, 0.1), blur_prob=0.5)
    return (view, view)


def _byol(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    return _asymmetric(config, supervised_view(config))


def _dino(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    local = dataclasses.replace(
        _colored(config, supervised_view(config), (0.4, 0.4, 0.2, 0.1), blur_prob=0.5),
        size=config.local_size,
        crop_area=config.local_crop_area,
    )
    return (*_asymmetric(config, _cropped(config, (0.4, 1.0))), *[local] * config.local_views)


def _supervised(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    return (supervised_view(config),)


def _supervised_color(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    return _simclr(config)[:1]


def _one_branch(config: AugmentConfig) -> tuple[ViewRecipe, ...]:
    plain = dataclasses.replace(supervised_view(config), crop="whole", shared_crop=True, flip_prob=0.0)
    changes: dict[str, Any] = {}
    for name in config.branch_transformations:
        changes |= _single_transformation(config, name)
    return (dataclasses.replace(plain, **changes), plain)


def _single_transformation(config: AugmentConfig, name: Transformation) -> dict[str, Any]:
    """What figure 5's transformation of that name changes in a plain view."""
    s = config.color_strength
    changes: dict[Transformation, dict[str, Any]] = {
        "crop": {"crop": "random_resized", "flip_prob": config.flip_prob},  # "crop and resize (and flip)"
        "cutout": {"cutout_prob": 1.0},
        "color": {
            "jitter_prob": 0.8,
            "brightness": 0.8 * s,
            "contrast": 0.8 * s,
            "saturation": 0.8 * s,
            "hue": 0.2 * s,
            "gray_prob": 0.2,
        },
        "sobel": {"sobel_prob": 1.0},
        "noise": {"noise_prob": 1.0},
        "blur": {"blur_prob": 0.5 if config.blur_prob is None else config.blur_prob},
        "rotate": {"rotate_prob": 0.75},  # 0, 90, 180 and 270 degrees alike
    }
    return changes[name]


def _asymmetric(config: AugmentConfig, view: ViewRecipe) -> tuple[ViewRecipe, ViewRecipe]:
    """BYOL's two views."""
    first = _colored(config, view, (0.4, 0.4, 0.2, 0.1), blur_prob=1.0)
    second = _colored(config, view, (0.4, 0.4, 0.2, 0.1), blur_prob=0.1)
    return first, dataclasses.replace(second, solarize_prob=0.2)


def _cropped(config: AugmentConfig, published_area: tuple[float, float]) -> ViewRecipe:
    return ViewRecipe(
        size=config.size,
        crop_area=config.crop_area or published_area,
        interpolation=config.interpolation,
        flip_prob=config.flip_prob,
    )


def _colored(
    config: AugmentConfig, view: ViewRecipe, jitter: tuple[float, float, float, float], *, blur_prob: float
) -> ViewRecipe:
    """`view` with jitter (brightness, contrast, saturation, hue) at probability 0.8, gray at 0.2, and blur."""
    brightness, contrast, saturation, hue = (config.color_strength * factor for factor in jitter)
    return dataclasses.replace(
        view,
        jitter_prob=0.8,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        gray_prob=0.2,
        blur_prob=blur_prob if config.blur_prob is None else config.blur_prob,
    )


_VIEWS = {
    "simclr": _simclr,
    "moco_v2": _moco_v2,
    "byol": _byol,
    "dino": _dino,
    "supervised": _supervised,
    "supervised_color": _supervised_color,
    "one_branch": _one_branch,
}
