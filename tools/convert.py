"""Converts a folder of images to one `.beton`: `python -m tools.convert photos train.beton`.

Beside `train.beton` it writes the manifest `train.beton.json` and, if files had to be left out, their names
and reasons in `train.beton.quarantine.jsonl`. Each appears under its name only once it is whole. The same
images, options and library versions give the same bytes, whatever the number of workers.

Exit codes: 0 done, also with files in quarantine; 2 bad input, and then nothing was written (but the
quarantine list, if it holds every file).
"""

import argparse
import json
import platform
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, get_args

import cv2
import numpy as np
import PIL
from PIL import features
from tqdm import tqdm

from pipelines.beton_layout import DEFAULT_PAGE_SIZE
from pipelines.manifest import Manifest, Quarantined, file_sha256, manifest_path
from tools.beton_writer import BetonWriter, check_page_size, forecast_bytes
from tools.image_decoding import UnusableImage, codec_settings, read_file
from tools.image_encoding import EncodedImage, EncodeOptions, Encoding, encode_image
from tools.image_folder import ImageFolder, scan_images
from tools.ordered_pool import OrderedMap, num_available_cores, ordered_pool
from tools.whole_file import clean_termination, partial_path, whole_file
from train.cli import run

FORECAST_SAMPLES = 200  # their mean is some 5 % off: file sizes spread by about two thirds of their mean
FORECAST_MARGIN = 0.1


@dataclass(kw_only=True)
class _Rows:
    """What is learned of the samples while they are written."""

    files: list[str] = field(default_factory=list)
    crc32: list[int] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)
    num_converted: int = 0
    quarantined: list[Quarantined] = field(default_factory=list)


def convert(
    source: Path,
    dest: Path,
    options: EncodeOptions,
    *,
    workers: int,
    page_size: int = DEFAULT_PAGE_SIZE,
    force: bool = False,
) -> Manifest:
    """Converts the images below `source` to the `.beton` file `dest`.

    Raises:
        ValueError, OSError: nothing was written (but the quarantine list, if it holds every file).
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}")
    check_page_size(page_size)
    _check_destination(source, dest, force=force)
    folder = scan_images(source)
    with codec_settings(), ordered_pool(workers) as ordered_map:
        _check_disk(folder, dest, options, page_size, ordered_map)
        with whole_file(manifest_path(dest)) as manifest_file, whole_file(dest) as beton_file:
            writer = BetonWriter(
                beton_file,
                capacity=len(folder.files),
                labelled=folder.labels is not None,
                page_size=page_size,
            )
            rows = _write_samples(writer, folder, options, ordered_map)
            if not rows.files:
                _write_quarantine(dest, rows.quarantined)
                first = rows.quarantined[0]
                raise ValueError(
                    f"none of the {len(rows.quarantined)} files in {source} can be used ({first.file!r} "
                    f"{first.reason}); all are listed in {quarantine_path(dest)}"
                )
            writer.finish()
            manifest = _manifest(beton_file, folder, rows, {**asdict(options), "page_size": page_size})
            manifest_file.write(manifest.to_json().encode())
            _write_quarantine(dest, rows.quarantined)
            # Should the machine stop between the two renames, no manifest is better than the old file's.
            manifest_path(dest).unlink(missing_ok=True)
    return manifest


def quarantine_path(dest: Path) -> Path:
    """Where the files that could not be used are listed, one JSON object a line."""
    return dest.with_name(dest.name + ".quarantine.jsonl")


def _check_destination(source: Path, dest: Path, *, force: bool) -> None:
    if dest.suffix != ".beton":
        raise ValueError(f"the destination must be named *.beton, got {dest}")
    if not dest.parent.is_dir():
        raise ValueError(f"the destination's folder {dest.parent} does not exist; create it")
    if dest.parent.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"the destination {dest} lies inside the source folder {source}; choose another place")
    for path in (dest, manifest_path(dest)):
        if path.is_dir():
            raise ValueError(f"the destination {path} is a folder; choose another name")
        if path.exists() and not force:
            raise ValueError(f"{path} exists; pass --force to replace it, or choose another name")
    left = [str(partial) for partial in map(partial_path, (dest, manifest_path(dest))) if partial.exists()]
    if left:
        raise ValueError(
            f"{' and '.join(left)} exist: another conversion is writing, or was killed; delete them if none is running"
        )


def _check_disk(
    folder: ImageFolder, dest: Path, options: EncodeOptions, page_size: int, ordered_map: OrderedMap
) -> None:
    """Encodes a few files to forecast the size, says it, and refuses what cannot fit."""
    total = len(folder.files)
    num_tried = min(total, FORECAST_SAMPLES, 32 + total // 100)  # a small folder should not be converted twice
    few = random.Random(0).sample(folder.files, num_tried)  # noqa: S311 — no secret
    results = [result for _, result in ordered_map(lambda name: _encode(folder, name, options), few)]
    mean_size = sum(len(result.data) for result in results if isinstance(result, EncodedImage)) / len(few)
    forecast = forecast_bytes(total, mean_size, labelled=folder.labels is not None, page_size=page_size)
    free = shutil.disk_usage(dest.parent).free
    print(
        f"{total} files, about {_human(mean_size)} each; forecast {_human(forecast)}, free {_human(free)}",
        file=sys.stderr,
    )
    if forecast * (1 + FORECAST_MARGIN) > free:
        raise ValueError(
            f"{dest} needs about {_human(forecast)} and a margin of {FORECAST_MARGIN:.0%}, but only "
            f"{_human(free)} are free there; make room, or lower --max-side or --quality"
        )


def _write_samples(writer: BetonWriter, folder: ImageFolder, options: EncodeOptions, ordered_map: OrderedMap) -> _Rows:
    rows = _Rows(class_counts=[0] * len(folder.classes or []))
    rows.quarantined += [Quarantined(file=name, reason="lies outside the class folders") for name in folder.strays]
    results = ordered_map(lambda name: _encode(folder, name, options), folder.files)
    progress = tqdm(results, total=len(folder.files), unit="img", disable=None)
    for i, (name, result) in enumerate(progress):
        if isinstance(result, Quarantined):
            rows.quarantined.append(result)
            continue
        label = folder.labels[i] if folder.labels else None
        writer.add(result, label)
        rows.files.append(name)
        rows.crc32.append(result.crc32)
        rows.num_converted += options.encode == "keep" and not result.kept
        if label is not None:
            rows.class_counts[label] += 1
    return rows


def _encode(folder: ImageFolder, name: str, options: EncodeOptions) -> EncodedImage | Quarantined:
    try:
        return encode_image(read_file(folder.root / name), options)
    except UnusableImage as unusable:
        return Quarantined(file=name, reason=str(unusable))


def _write_quarantine(dest: Path, quarantined: list[Quarantined]) -> None:
    """Replaces the list of an earlier conversion."""
    path = quarantine_path(dest)
    path.unlink(missing_ok=True)
    if quarantined:
        partial_path(path).write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in quarantined))
        partial_path(path).replace(path)


def _manifest(beton_file: BinaryIO, folder: ImageFolder, rows: _Rows, options: dict[str, str | int]) -> Manifest:
    return Manifest(
        sha256=file_sha256(beton_file),
        num_bytes=beton_file.seek(0, 2),
        num_samples=len(rows.files),
        classes=folder.classes,
        class_counts=rows.class_counts if folder.classes is not None else None,
        options=options,
        num_converted=rows.num_converted,
        quarantined=rows.quarantined,
        tools={
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "pillow_libjpeg_turbo": str(features.version_feature("libjpeg_turbo")),
            "opencv": cv2.__version__,
        },
        files=rows.files,
        crc32=rows.crc32,
    )


def _human(num_bytes: float) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description="Convert a folder of images to one .beton file, which Twinview and FFCV read.",
        epilog="Files that cannot be used are listed with the reason in DEST.quarantine.jsonl; DEST.json "
        "names classes, files, options and checksums. Check the result with `python -m tools.verify`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a folder with one folder of images per class, or with images only")
    parser.add_argument("dest", type=Path, help="the .beton file to write")
    parser.add_argument(
        "--encode",
        choices=get_args(Encoding),
        default="jpeg",
        help="jpeg: re-encode, 4:2:0; keep: JPEG bytes untouched, the rest re-encoded; raw: RGB pixels",
    )
    parser.add_argument(
        "--max-side", type=int, default=500, help="longest side, in pixels, of what is not kept; 0: no limit"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of what is re-encoded, 1 to 100")
    parser.add_argument("--workers", type=int, default=num_available_cores(), help="threads")
    parser.add_argument(
        "--page-size",
        type=int,
        default=DEFAULT_PAGE_SIZE,
        help="bytes, a power of two; pages grow if one sample is larger",
    )
    parser.add_argument("--force", action="store_true", help="replace DEST if it exists")
    return parser


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    options = EncodeOptions(encode=args.encode, max_side=args.max_side, quality=args.quality)
    start = time.perf_counter()
    with clean_termination():
        manifest = convert(
            args.source,
            args.dest,
            options,
            workers=args.workers,
            page_size=args.page_size,
            force=args.force,
        )
    seconds = time.perf_counter() - start
    classes = f"{len(manifest.classes)} classes" if manifest.classes is not None else "no labels"
    if num_empty := (manifest.class_counts or []).count(0):
        classes += f" ({num_empty} without a usable image)"
    converted = f"; {manifest.num_converted} could not be kept and were converted" if manifest.num_converted else ""
    quarantine = f"quarantined {len(manifest.quarantined)}"
    if manifest.quarantined:
        quarantine += f" → {quarantine_path(args.dest)}"
    print(
        f"{args.dest}: {manifest.num_samples} images, {classes}, {_human(manifest.num_bytes)}, "
        f"{manifest.num_samples / seconds:.0f} images/s{converted}; {quarantine}"
    )
    return 0


if __name__ == "__main__":
    run(main)
