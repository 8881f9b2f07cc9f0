"""Makes a checkpoint of another program's encoder: `python -m tools.import_checkpoint --file F --out X.safetensors`.

Reads ResNets of torchvision, timm, lightly and solo-learn, and what bears their names (MoCo's, DINO's, DataParallel's
`module.`), from a state dict, a Lightning checkpoint or safetensors. No code in the file is run. Depth, width and stem
are found by names and shapes. The source's own network, with the file's weights, and the imported encoder must agree
on images before anything is written.

`train/evaluate.py` evaluates the result, and `train.initial_encoder` starts a pretraining from it.

Exit codes: 0 written and compared; 1 the encoders do not agree; 2 bad input. Nothing is written but under 0.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from model.build import ModelConfig
from model.resnet import NUM_BLOCKS, EncoderConfig, ResNet
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from pipelines.recipe import Interpolation
from tools.export import example_images, largest_deviation
from tools.foreign_checkpoints import choose_prefix, read_tensors
from tools.foreign_encoders import (
    LIGHTLY,
    Layout,
    Source,
    build_reference,
    detect_config,
    find_layout,
    guess_source,
)
from tools.whole_file import clean_termination
from train.checkpoint import Checkpoint, save_checkpoint
from train.cli import RunFailed, run
from train.config import PretrainConfig, resolved_dict
from train.evaluation.representation import load_encoder
from train.initial_encoder import ENCODER, check_fits
from train.runtime import package_versions

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET_SIDE, CIFAR_SIDE = 224, 32
TOLERANCE = 1e-5  # of the largest number: the same operations in the same order, hence some last digits at most


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What the encoder expects of images, which no file tells."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    size: int | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"`--size` must be at least 1, got {self.size}")
        for name in ("mean", "std"):
            if not all(math.isfinite(number) for number in getattr(self, name)):
                raise ValueError(f"`--{name}` must be finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was found and written.

    Attributes:
        source: whose it is.
        prefix: what stood before its tensors' names.
        config: the encoder.
        compared: what was compared with the source's own network, "logits" or "representations".
        deviation: the largest difference, as a share of the largest number.
    """

    source: Source
    prefix: str
    config: EncoderConfig
    compared: str
    deviation: float


def import_checkpoint(
    file: Path,
    out: Path,
    *,
    source: Source | None = None,
    depth: int | None = None,
    prefix: str | None = None,
    normalisation: Normalisation = Normalisation(),
    force: bool = False,
) -> Imported:
    """Read, map, compare, write.

    Args:
        file: the other program's.
        out: the checkpoint to write.
        source: whose file it is; None: by its names.
        depth: refuse any other; None: by its names.
        prefix: the end of what stands before the encoder's names; None: to be found.
        normalisation: what the encoder expects of images.
        force: replace `out`.

    Raises:
        ValueError: the file is missing, damaged, holds code, or holds no encoder that fits; names the first tensor that
            does not.
        RunFailed: the encoders do not agree.
    """
    if out.exists() and not force:
        raise ValueError(f"{out} exists; name another, or replace it with `--force`")
    names = read_tensors(file)
    prefix = choose_prefix(names, prefix, file)
    tensors = {
        name.removeprefix(prefix): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in names.items()
        if name.startswith(prefix)
    }
    layout = find_layout(tensors)
    source = _settle_source(source, guess_source(layout, names, prefix), layout, tensors, file)
    config = detect_config(tensors, layout, source)
    if depth not in (None, config.depth):
        raise ValueError(f"`--depth` must be that of {file}, {config.depth}, got {depth}")
    weights = _map(tensors, layout, config, file)
    encoder = load_encoder(config, weights, file)
    compared, deviation = _compare(encoder, config, tensors, source, layout)
    if not deviation <= TOLERANCE:
        raise RunFailed(
            f"{compared} of {file} deviate by {deviation:.1e} of the largest number between {source}'s network and "
            f"the imported encoder, at most {TOLERANCE:.0e} is rounding; nothing was written"
        )
    origin = {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "source": source,
        "prefix": prefix,
    }
    save_checkpoint(out, _checkpoint(weights, config, normalisation, origin))
    return Imported(source=source, prefix=prefix, config=config, compared=compared, deviation=deviation)


def _settle_source(
    asked: Source | None, guessed: Source | None, layout: Layout, tensors: Mapping[str, Tensor], file: Path
) -> Source:
    if layout.shortcut == "shortcut" or layout.is_sequential:
        if asked not in (None, "lightly"):
            raise ValueError(f"`--source` must be lightly, whose names {file} has, got {asked}")
        return "lightly"
    source = asked or guessed
    if source is None and tensors["conv1.weight"].shape[2:] == (3, 3):
        raise ValueError(
            f"`--source` must be given: {file} has a CIFAR stem, which users of lightly and solo-learn pad differently"
        )
    return source or "torchvision"


def _map(tensors: Mapping[str, Tensor], layout: Layout, config: EncoderConfig, file: Path) -> dict[str, Tensor]:
    """The encoder's tensors under our names; all of them, and nothing is left over but a classifier."""
    with torch.device("meta"):
        ours = ResNet(config).state_dict()
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{layout.classifier}.")}
    if not any(name.endswith("num_batches_tracked") for name in rest):  # torch counts batches since version 0.4.1
        counters = (layout.theirs(name) for name in ours if name.endswith("num_batches_tracked"))
        rest |= {name: torch.tensor(0) for name in counters}
    expected = {layout.theirs(name): tensor for name, tensor in ours.items()}
    check_fits(rest, expected, file, f"it is no ResNet-{config.depth} of width {config.width:g} as it seemed to be")
    _check_numbers(tensors, file)
    return {name: rest[layout.theirs(name)].contiguous() for name in ours}


def _check_numbers(tensors: Mapping[str, Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        is_count = name.endswith("num_batches_tracked") and not tensor.is_complex()
        if tensor.layout != torch.strided or tensor.is_meta or not (tensor.is_floating_point() or is_count):
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"`{name}` must be a dense tensor of floating-point numbers, got {kind} in {file}")


def _compare(
    encoder: ResNet, config: EncoderConfig, tensors: Mapping[str, Tensor], source: Source, layout: Layout
) -> tuple[str, float]:
    """What was compared, and the largest deviation between the source's own network and the encoder."""
    weight = tensors.get(f"{layout.classifier}.weight")
    has_logits = weight is not None and weight.ndim == 2 and weight.shape[1] == encoder.feature_dim
    num_classes = len(weight) if weight is not None and has_logits else 0
    reference = build_reference(source, layout, config, num_classes)
    if reference is None:
        raise ValueError(
            f"no installed package builds a ResNet-{config.depth} of width {config.width:g}, {config.stem} stem and "
            f"`{layout.shortcut}` layers to compare with; lightly's need lightly: pip install lightly"
        )
    taken = {name: tensor for name, tensor in tensors.items() if has_logits or not name.startswith(layout.classifier)}
    lacking = reference.load_state_dict(taken, strict=False)
    assert not lacking.unexpected_keys, lacking
    assert all(name.endswith("num_batches_tracked") for name in lacking.missing_keys), lacking

    def ours(images: Tensor) -> Tensor:
        h: Tensor = encoder(images)
        return F.linear(h, weight, tensors.get(f"{layout.classifier}.bias")) if weight is not None and has_logits else h

    side = 64 if config.stem == "imagenet" else CIFAR_SIDE
    above = None if layout is LIGHTLY else side  # its last pooling is over 4×4 positions, which 32×32 images have
    deviation = largest_deviation(reference, ours, example_images(side, above))
    return "logits" if has_logits else "representations", deviation


def _checkpoint(
    weights: dict[str, Tensor], encoder: EncoderConfig, normalisation: Normalisation, origin: dict[str, Any]
) -> Checkpoint:
    config = PretrainConfig(
        name="imported",
        data=DataConfig(path="none"),
        augment=AugmentConfig(
            size=normalisation.size or (IMAGENET_SIDE if encoder.stem == "imagenet" else CIFAR_SIDE),
            interpolation=normalisation.interpolation,
            mean=normalisation.mean,
            std=normalisation.std,
        ),
        model=ModelConfig(encoder=encoder),
    )
    return Checkpoint(
        model={f"{ENCODER}{name}": tensor for name, tensor in weights.items()},
        position={"step": 0, "imported": origin},
        config=resolved_dict(config),
        versions=package_versions(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.import_checkpoint",
        description="Make a checkpoint of an encoder that torchvision, timm, lightly or solo-learn trained.",
        epilog="No code in the file is run. The imported encoder is compared with the source's own network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--file", type=Path, required=True, help="what to read: torch.save's, Lightning's, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--source", choices=(*get_args(Source), "auto"), default="auto", help="who wrote the file")
    parser.add_argument("--depth", type=int, choices=list(NUM_BLOCKS), help="refuse any other")
    parser.add_argument("--prefix", help="of an encoder and its twins: the end of what stands before the names")
    parser.add_argument("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="that images were normalised by")
    parser.add_argument("--std", type=float, nargs=3, default=IMAGENET_STD, help="that images were normalised by")
    parser.add_argument("--size", type=int, help="side of the images; by default 224, or 32 with a CIFAR stem")
    parser.add_argument("--interpolation", choices=get_args(Interpolation), default="bilinear", help="of the resizing")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")
    return parser


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    normalisation = Normalisation(
        mean=tuple(args.mean), std=tuple(args.std), size=args.size, interpolation=args.interpolation
    )
    with clean_termination():
        found = import_checkpoint(
            args.file,
            args.out,
            source=None if args.source == "auto" else args.source,
            depth=args.depth,
            prefix=args.prefix,
            normalisation=normalisation,
            force=args.force,
        )
    config = found.config
    place = f"under `{found.prefix}`" if found.prefix else "alone in its file"
    print(
        f"{args.out}: ResNet-{config.depth}, width {config.width:g}, {config.stem} stem, {found.source}'s {place}; "
        f"{found.compared} deviate by {found.deviation:.1e} of the largest number from its own network"
    )


if __name__ == "__main__":
    run(main)
