"""Shows what the model sees: images, their views, and what was drawn for each, as a picture or a page.

    python -m tools.preview train.beton --out preview.png
    python -m tools.preview photos --out preview.html --augment.recipe dino --images 4

The views come out of the loader that training uses (the file's for a `.beton`, torchvision's for a folder), and depend
on seed, epoch and row alone: they are those that a run with the same options computes on the CPU, in float32.
`--config` takes the augmentation and the seed from a run's configuration; other options override it.

Exit codes: 0 written; 2 bad input.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.batch import Batch, Loader
from pipelines.beton import MODE_RAW, Beton, open_beton
from pipelines.build import DataConfig
from pipelines.draw import draw_views
from pipelines.ffcv_loader import FFCVLoader
from pipelines.folder_dataset import decode_image
from pipelines.folder_loader import FolderLoader
from pipelines.manifest import ManifestError, load_manifest
from pipelines.recipe import Recipe
from tools.preview_page import page
from tools.preview_sheet import Sheet, Shown, draw_sheet
from tools.whole_file import whole_file
from train.cli import parse, run
from train.config import PretrainConfig
from train.plain_yaml import load_plain_yaml

PNG, HTML = ".png", ".html"


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """What is shown, and where it is written."""

    source: str
    """A `.beton`, or a folder of images."""
    out: str
    """The file to write, `.png` or `.html`."""
    images: int = 8
    """How many rows are shown."""
    start: int = 0
    """The first of them."""
    epoch: int = 0
    """In which the views are drawn."""
    seed: int = 0
    """Of the run."""
    scaled_decode: bool = DataConfig.scaled_decode
    """As `data.scaled_decode` of a run."""
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        if Path(self.out).suffix.lower() not in {PNG, HTML}:
            raise ValueError(f"`out` must be named *.png or *.html, got {self.out}")
        if not Path(self.out).parent.is_dir():
            raise ValueError(f"`out` must lie in a folder that exists, got {self.out}; make {Path(self.out).parent}")
        for name, low in (("images", 1), ("start", 0), ("epoch", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` must be at least {low}, got {getattr(self, name)}")


def parse_config(arguments: Sequence[str] | None = None) -> PreviewConfig:
    """Read the command line.

    Raises:
        ValueError: an unknown option, or a value outside its choices; one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m tools.preview",
        description="Show what the model sees: images, their views, and what was drawn for each.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("source", help="a `.beton`, or a folder of images")
    parser.add_argument("--config", help="a run's YAML: its `augment`, `seed` and `data.scaled_decode` are taken")
    parser.add_class_arguments(PreviewConfig, skip={"source"})
    first = parse(parser, arguments)
    if first.config is not None:
        parser.set_defaults(_flat(read_sections(Path(first.config))))
    values = parser.instantiate(parse(parser, arguments))
    return PreviewConfig(**{name: values[name] for name in PreviewConfig.__dataclass_fields__})


def read_sections(path: Path) -> dict[str, Any]:
    """`augment` and `seed` of a run's configuration.

    Raises:
        ValueError: it is no configuration of a run.
        OSError: it cannot be read.
    """
    try:
        found = load_plain_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`--config` must name a YAML file, got {path}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`--config` must name a YAML file of sections and options, got {path}")
    if unknown := sorted(str(name) for name in set(found) - set(PretrainConfig.__dataclass_fields__)):
        raise ValueError(f"`--config` must name a run's configuration; {path} has the unknown section `{unknown[0]}`")
    sections = {name: found[name] for name in ("augment", "seed") if name in found}
    data = found.get("data")
    if isinstance(data, dict) and "scaled_decode" in data:
        sections["scaled_decode"] = data["scaled_decode"]
    return sections


def write_preview(config: PreviewConfig) -> Path:
    """Write what `config` asks for.

    Returns:
        The file.

    Raises:
        ValueError, OSError: the source cannot be read, or has no such row; nothing was written.
    """
    path = Path(config.out)
    sheet = make_sheet(config)
    if path.suffix.lower() == HTML:
        data = page(sheet).encode()
    else:
        file = io.BytesIO()
        draw_sheet(sheet).save(file, "PNG")
        data = file.getvalue()
    with whole_file(path) as out:
        out.write(data)
    return path


def make_sheet(config: PreviewConfig) -> Sheet:
    """Load the images and their views."""
    recipe = build_recipe(config.augment)
    source = Path(config.source)
    images = _of_folder(config, source, recipe) if source.is_dir() else _of_beton(config, open_beton(source), recipe)
    rows = f"row {images[0].row}" if len(images) == 1 else f"rows {images[0].row} to {images[-1].row}"
    title = f"{source.name} · {config.augment.recipe} · seed {config.seed} · epoch {config.epoch} · {rows}"
    return Sheet(title=title, recipe=recipe, images=images, settings=_as_yaml(config))


def _of_beton(config: PreviewConfig, beton: Beton, recipe: Recipe) -> list[Shown]:
    rows = _rows(config, beton.num_samples)
    loader = FFCVLoader(
        beton,
        recipe,
        seed=config.seed,
        global_batch_size=config.images,
        training=False,
        scaled_decode=config.scaled_decode,
    )
    try:
        views = _views(loader, rows, config)
    finally:
        loader.close()
    originals = [stored_pixels(beton, row) for row in rows]
    return _shown(config, recipe, rows, _names(beton, rows), originals, views)


def _of_folder(config: PreviewConfig, root: Path, recipe: Recipe) -> list[Shown]:
    loader = FolderLoader(root, recipe, seed=config.seed, global_batch_size=config.images, training=False)
    rows = _rows(config, len(loader.dataset))
    files = [loader.dataset.files[row] for row in rows]
    views = _views(loader, rows, config)
    originals = [decode_image(file).permute(1, 2, 0).numpy() for file in files]
    names = [str(Path(file).relative_to(root)) for file in files]
    return _shown(config, recipe, rows, names, originals, views)


def _rows(config: PreviewConfig, num_samples: int) -> range:
    if config.start >= num_samples:
        raise ValueError(f"`start` must be a row of {config.source}, 0 to {num_samples - 1}, got {config.start}")
    return range(config.start, min(config.start + config.images, num_samples))


def _views(loader: Loader, rows: range, config: PreviewConfig) -> list[Tensor]:
    """The views of `rows`, V × [n, 3, S, S]: in the order of the set, they lie in one batch or two neighbours."""
    first = rows.start // config.images
    batches: list[Batch] = []
    for batch in loader.epoch(config.epoch, first):
        batches.append(batch)
        if batch.sample_indices[-1] >= rows[-1]:
            break
    begin = rows.start - first * config.images
    together = [torch.cat(parts) for parts in zip(*(batch.views for batch in batches), strict=True)]
    return [view[begin : begin + len(rows)] for view in together]


def _shown(
    config: PreviewConfig,
    recipe: Recipe,
    rows: range,
    names: list[str],
    originals: list[NDArray[np.uint8]],
    views: list[Tensor],
) -> list[Shown]:
    heights, widths = (np.array([image.shape[axis] for image in originals], np.int32) for axis in (0, 1))
    params = draw_views(recipe, config.seed, config.epoch, np.array(rows, np.int64), widths, heights)
    levels = [_levels(view, recipe) for view in views]
    return [
        Shown(row=row, name=names[i], original=originals[i], params=params[i], views=[view[i] for view in levels])
        for i, row in enumerate(rows)
    ]


def _levels(views: Tensor, recipe: Recipe) -> NDArray[np.uint8]:
    """Views without their normalisation, uint8 [n, S, S, 3]."""
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    pixels = (views.permute(0, 2, 3, 1) * std + mean) * 255.0
    levels: NDArray[np.uint8] = pixels.round().clamp(0.0, 255.0).to(torch.uint8).numpy()
    return levels


def _names(beton: Beton, rows: range) -> list[str]:
    """Of the manifest, if there is a sound one of this file."""
    try:
        manifest = load_manifest(beton.path)
    except ManifestError:
        manifest = None
    if manifest is None or len(manifest.files) != beton.num_samples:
        return [""] * len(rows)
    return [manifest.files[row] for row in rows]


def stored_pixels(beton: Beton, row: int) -> NDArray[np.uint8]:
    """An image of a `.beton` as it is stored, uint8 [H, W, 3]."""
    if beton.modes[row] == MODE_RAW:
        return beton.encoded(row).reshape(int(beton.heights[row]), int(beton.widths[row]), 3)
    return np.asarray(Image.open(io.BytesIO(beton.encoded(row).tobytes())).convert("RGB"))


def _as_yaml(config: PreviewConfig) -> str:
    augment = asdict(config.augment)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in augment.items()}
    return yaml.safe_dump({"seed": config.seed, "augment": plain}, sort_keys=False, default_flow_style=None)


def _flat(sections: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted options."""
    flat: dict[str, Any] = {}
    for name, value in sections.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def main() -> None:
    """Parse and write."""
    print(write_preview(parse_config()))


if __name__ == "__main__":
    run(main)
