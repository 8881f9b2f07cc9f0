"""Writes a run's encoder for other programs: `python -m tools.export --checkpoint runs/photos --format onnx`.

What is written is the encoder, without the projection head. Beside the file lies a JSON with what it expects (side,
interpolation, mean and deviation of the images) and how to load it; the file's own metadata say the same. The file is
read back and compared with the encoder before it gets its name.

Exit codes: 0 written and compared; 2 bad input, or a package is missing, and then nothing was written.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from model.resnet import EncoderConfig, ResNet
from tools.export_counterparts import Counterpart, Keys, find_counterpart
from tools.export_formats import (
    OPSET,
    SUFFIXES,
    Format,
    Represent,
    check_packages,
    free_sides,
    from_onnx,
    from_program,
    from_safetensors,
    to_onnx,
    to_program,
    to_safetensors,
)
from tools.whole_file import clean_termination, partial_path, whole_file
from train.checkpoint import Checkpoint, load_checkpoint
from train.cli import RunFailed, run
from train.config import PretrainConfig, config_from_dict
from train.evaluation.representation import load_encoder
from train.initial_encoder import Weights, Which, encoder_weights, find_checkpoint, results_dir
from train.runtime import package_versions

TOLERANCE = 1e-4
"""Of the largest number in h. Other kernels and folded batch norms change the sixth digit, a wrong layer the first."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        path: the file; `<path>.json` lies beside it.
        deviation: the largest difference of its representations from the encoder's, as a share of the largest number.
        changes: Python lines that change the other library's network before it takes the weights.
    """

    path: Path
    deviation: float
    changes: tuple[str, ...]


def export(
    checkpoint: Path,
    file_format: Format,
    *,
    keys: Keys | None = None,
    weights: Weights = "live",
    which: Which = "latest",
    out: Path | None = None,
) -> Exported:
    """Write the encoder of a checkpoint, prove what was written, and only then give it its name.

    Args:
        checkpoint: a file, or a run directory.
        file_format: what to write.
        keys: for safetensors, the library that is to load it; torchvision by default.
        weights: of the last step, or their moving average.
        which: of a run directory, the latest checkpoint or the best.
        out: a folder; by default `export/` of the run.

    Raises:
        ValueError: the checkpoint is missing or damaged, or the format cannot hold its encoder.
        UnfitEnvironment: a package is missing.
        RunFailed: the file computes something else than the encoder.
    """
    if keys is not None and file_format != "safetensors":
        raise ValueError(f"`--keys` needs `--format safetensors`, got {file_format}, which holds the network itself")
    check_packages(file_format)
    source = find_checkpoint(checkpoint, which)
    loaded = load_checkpoint(source)
    config = config_from_dict(loaded.config)
    counterpart: Counterpart | None = None
    if file_format == "safetensors":
        counterpart = find_counterpart(config.model.encoder, keys or "torchvision")
    encoder = load_encoder(config.model.encoder, encoder_weights(loaded, weights, source), source)

    name = "-".join(["encoder", *([keys or "torchvision"] if counterpart else []), *_suffix(weights)])
    path = (out or results_dir(source) / "export") / f"{name}{SUFFIXES[file_format]}"
    description = _describe(config, loaded, source, weights) | _usage(file_format, path, counterpart, config)
    above = free_sides(config.model.encoder, config.augment.size)
    content = _serialise(file_format, encoder, config.augment.size, above, description)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.json")
    with whole_file(beside) as json_file, whole_file(path) as file:
        file.write(content)
        file.flush()
        represent = _deserialise(file_format, partial_path(path).read_bytes(), counterpart)
        deviation = largest_deviation(encoder, represent, example_images(config.augment.size, above))
        if not deviation <= TOLERANCE:
            raise RunFailed(
                f"{path} would deviate by {deviation:.1e} of the largest number from the encoder, where at most "
                f"{TOLERANCE:.0e} is rounding; nothing was written"
            )
        text = json.dumps(description | {"largest_deviation": deviation}, indent=2, ensure_ascii=False)
        json_file.write(f"{text}\n".encode())
    return Exported(path=path, deviation=deviation, changes=counterpart.changes if counterpart else ())


def example_images(side: int, above: int | None) -> list[Tensor]:
    """Batches of normalised noise: of the side trained on, and where sides are free, of others."""
    shapes = [(2, side, side), (1, side, side)]
    if above is not None:
        shapes.append((3, above + 1, side + 9))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, height, width, generator=generator) for count, height, width in shapes]


@torch.inference_mode()
def largest_deviation(expected: Represent, found: Represent, batches: list[Tensor]) -> float:
    """The largest difference between two encoders, as a share of the largest number; NaN where either has one."""
    deviation = 0.0
    for images in batches:
        h = expected(images)
        difference = ((found(images) - h).abs().max() / h.abs().max().clamp_min(torch.finfo(h.dtype).tiny)).item()
        deviation = math.nan if math.isnan(difference) else max(deviation, difference)
    return deviation


def _serialise(
    file_format: Format, encoder: ResNet, side: int, above: int | None, description: dict[str, Any]
) -> bytes:
    if file_format == "safetensors":
        return to_safetensors(encoder, description)
    return (to_onnx if file_format == "onnx" else to_program)(encoder, side, above, description)


def _deserialise(file_format: Format, content: bytes, counterpart: Counterpart | None) -> Represent:
    if counterpart is not None:
        return from_safetensors(content, counterpart)
    return from_onnx(content) if file_format == "onnx" else from_program(content)


def _suffix(weights: Weights) -> list[str]:
    return ["average"] if weights == "average" else []


def _describe(config: PretrainConfig, checkpoint: Checkpoint, source: Path, weights: Weights) -> dict[str, Any]:
    """What the encoder is and expects, whatever the format."""
    encoder: EncoderConfig = config.model.encoder
    return {
        "encoder": asdict(encoder),
        "input": {
            "layout": "[N, 3, H, W], float32, RGB in [0, 1], then (x - mean) / std",
            "mean": list(config.augment.mean),
            "std": list(config.augment.std),
            "side": config.augment.size,
            "interpolation": f"{config.augment.interpolation}, antialiased, of the central square",
        },
        "output": "representation h [N, D], before the projection head",
        "checkpoint": str(source),
        "step": checkpoint.position.get("step"),
        "weights": weights,
        "versions": package_versions(),
    }


def _usage(file_format: Format, path: Path, counterpart: Counterpart | None, config: PretrainConfig) -> dict[str, Any]:
    """How the file is loaded."""
    if counterpart is not None:
        load = f'model.load_state_dict(safetensors.torch.load_file("{path.name}"))'
        lines = [*counterpart.lines, "import safetensors.torch", load, "model.eval()"]
        return {"load": lines, "changes": list(counterpart.changes)}
    above = free_sides(config.model.encoder, config.augment.size)
    sides = {"sides": f"{config.augment.size} alone" if above is None else f"any over {above}"}
    if file_format == "onnx":
        return sides | {"opset": OPSET, "load": [f'onnxruntime.InferenceSession("{path.name}")']}
    return sides | {"load": [f'torch.export.load("{path.name}").module()']}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export",
        description="Write a run's encoder, without its projection head, for other programs.",
        epilog="Beside the file lies a JSON: what the encoder expects of images, and how to load it.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run directory, or a checkpoint file")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        required=True,
        help="safetensors: weights for torchvision's or timm's ResNets; onnx, torch_export: weights and network",
    )
    parser.add_argument("--keys", choices=get_args(Keys), help="safetensors: who is to load it (torchvision)")
    parser.add_argument(
        "--weights", choices=get_args(Weights), default="live", help="of the last step, or their average (live)"
    )
    parser.add_argument(
        "--which", choices=get_args(Which), default="latest", help="of a run's checkpoints: latest or best (latest)"
    )
    parser.add_argument("--out", type=Path, help="folder to write into (export/ in the run directory)")
    return parser


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    with clean_termination():
        exported = export(
            args.checkpoint, args.format, keys=args.keys, weights=args.weights, which=args.which, out=args.out
        )
    print(f"{exported.path}: deviates by {exported.deviation:.1e} of the largest number from the encoder")
    if exported.changes:
        print(f"to load it, change the network first: {'; '.join(exported.changes)}")


if __name__ == "__main__":
    run(main)
