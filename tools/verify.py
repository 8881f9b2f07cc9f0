"""Proves a `.beton` against its manifest and, given the folder, against the images it was made of.

    python -m tools.verify train.beton [--images photos]

Always: the tables are sound, the file's SHA-256 and each sample's CRC-32 are the manifest's, every sample
decodes whole to its stated size, labels and counts agree. With `--images`: the folder holds the same files
in the same classes, and each is encoded anew and compared: kept and raw samples byte for byte; re-encoded
ones too, or, where library versions differ, by pixels (PSNR of at least 40 dB).

Exit codes: 0 proved; 1 at least one thing is wrong, all are printed by sample and file; 2 bad usage.
"""

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from pipelines.beton import MODE_JPEG, MODE_RAW, Beton, BetonError, open_beton
from pipelines.manifest import Manifest, ManifestError, file_sha256, load_manifest, manifest_path
from tools.image_decoding import (
    ImageArray,
    UnusableImage,
    codec_settings,
    open_image,
    read_file,
    reasons,
    rgb_pixels,
)
from tools.image_encoding import EncodeOptions, Encoding, encode_image
from tools.image_folder import ImageFolder, scan_images
from tools.jpeg_decoding import decode_jpeg
from tools.ordered_pool import OrderedMap, num_available_cores, ordered_pool
from train.cli import run

MIN_PSNR_DB = 40.0  # two libjpeg versions differ by a level here and there (above 50 dB), other pictures by far more
MAX_PRINTED = 100


def verify(beton_path: Path, images: Path | None = None, *, workers: int) -> Iterator[str]:
    """Yields one line for each thing that is wrong; nothing if the file is proved.

    Raises:
        ValueError: there is no such `.beton`, or `images` is no folder of images.
    """
    if not beton_path.is_file():
        raise ValueError(f"{beton_path}: no such file")
    folder = scan_images(images) if images else None
    try:
        beton = open_beton(beton_path)
    except BetonError as error:
        yield str(error)
        return
    try:
        manifest = load_manifest(beton_path)
    except ManifestError as error:
        yield str(error)
        return
    if manifest is None:
        yield f"{manifest_path(beton_path)}: no such file; only the tables and the samples are checked"
    elif manifest.num_samples != beton.num_samples:
        yield f"the manifest has {manifest.num_samples} samples, the file {beton.num_samples}"
        return
    if manifest and folder:
        try:
            _encode_options(manifest)
        except (KeyError, TypeError, ValueError) as error:
            yield f"{manifest_path(beton_path)}: its options cannot be understood ({error})"
            return
    yield from _check_tables(beton, manifest)
    if manifest and folder:
        yield from _check_files(manifest, folder)
    with codec_settings(), ordered_pool(workers) as ordered_map:
        yield from _check_samples(beton, manifest, folder, ordered_map)


def _check_tables(beton: Beton, manifest: Manifest | None) -> Iterator[str]:
    last = beton.offsets + beton.sizes - 1
    for row in np.flatnonzero(beton.offsets // beton.page_size != last // beton.page_size).tolist():
        yield f"{_name(manifest, row)} crosses a page boundary; FFCV's page cache would misread it"
    if manifest is None:
        return
    with beton.path.open("rb") as file:
        sha256 = file_sha256(file)
    if sha256 != manifest.sha256:
        yield f"the file's sha256 is {sha256}, the manifest's {manifest.sha256}"
    if manifest.classes is None or beton.labels is None:
        if (manifest.classes is None) != (beton.labels is None):
            yield "one of the file and the manifest has labels, the other has none"
        return
    names = dict(enumerate(manifest.classes))
    for row, label in enumerate(beton.labels.tolist()):
        expected, found = manifest.files[row].split("/")[0], names.get(label)
        if found != expected:
            yield f"{_name(manifest, row)} has label {label}, class {found!r}, but lies in {expected!r}"
    found_counts = dict(zip(*(column.tolist() for column in np.unique(beton.labels, return_counts=True)), strict=True))
    counts = [found_counts.get(label, 0) for label in names]
    if counts != manifest.class_counts:
        yield f"the classes have {counts} samples, by the manifest {manifest.class_counts}"


def _check_files(manifest: Manifest, folder: ImageFolder) -> Iterator[str]:
    if folder.classes != manifest.classes:
        yield f"{folder.root} has the classes {folder.classes}, the manifest {manifest.classes}"
    known = {*manifest.files, *(entry.file for entry in manifest.quarantined)}
    present = {*folder.files, *folder.strays}
    yield from (f"{name!r} is in the folder, but not in the manifest" for name in sorted(present - known))
    yield from (f"{name!r} is in the manifest, but not in the folder" for name in sorted(known - present))


def _check_samples(
    beton: Beton, manifest: Manifest | None, folder: ImageFolder | None, ordered_map: OrderedMap
) -> Iterator[str]:
    present = set(folder.files) if folder else set()

    def check(row: int) -> str | None:
        data = beton.encoded(row).tobytes()
        if manifest and zlib.crc32(data) != manifest.crc32[row]:
            return f"its crc32 is {zlib.crc32(data):08x}, the manifest's {manifest.crc32[row]:08x}"
        stated = (int(beton.heights[row]), int(beton.widths[row]))
        try:
            if beton.modes[row] == MODE_JPEG and (found := _decode(data).shape[:2]) != stated:
                return f"it is {found[1]}×{found[0]} pixels, its table says {stated[1]}×{stated[0]}"
            if manifest and folder and manifest.files[row] in present:
                return _compare(data, int(beton.modes[row]), folder.root / manifest.files[row], manifest)
        except UnusableImage as unusable:
            return f"it {unusable}"
        return None

    rows = range(beton.num_samples)
    for row, problem in tqdm(ordered_map(check, rows), total=len(rows), unit="img", disable=None):
        if problem:
            yield f"{_name(manifest, row)}: {problem}"


def _compare(data: bytes, mode: int, path: Path, manifest: Manifest) -> str | None:
    """Encodes the source file anew and compares; None if it is the same image."""
    try:
        expected = encode_image(read_file(path), _encode_options(manifest))
    except UnusableImage as unusable:
        return f"its source {unusable}"
    if expected.data == data:
        return None
    if expected.kept or MODE_RAW in (mode, expected.mode):
        return "its bytes are not those of its source"
    psnr = _psnr(_decode(data), _decode(expected.data))
    return None if psnr >= MIN_PSNR_DB else f"it is not the image of its source (PSNR {psnr:.1f} dB)"


def _encode_options(manifest: Manifest) -> EncodeOptions:
    options = manifest.options
    return EncodeOptions(
        encode=cast(Encoding, options["encode"]),
        max_side=int(options["max_side"]),
        quality=int(options["quality"]),
    )


def _decode(jpeg: bytes) -> ImageArray:
    with reasons():
        pixels = decode_jpeg(jpeg)
        return rgb_pixels(open_image(jpeg)) if pixels is None else pixels


def _psnr(a: ImageArray, b: ImageArray) -> float:
    """Peak signal-to-noise ratio of two 8-bit images, dB; 0 if their sizes differ."""
    if a.shape != b.shape:
        return 0.0
    mean_square = float(np.mean((a.astype(np.float32) - b) ** 2))
    return float(10 * np.log10(255**2 / max(mean_square, 1e-9)))


def _name(manifest: Manifest | None, row: int) -> str:
    return f"sample {row} ({manifest.files[row]!r})" if manifest else f"sample {row}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify",
        description="Prove a .beton against its manifest and, given the folder, against the images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("beton", type=Path, help="the .beton file; its manifest lies beside it")
    parser.add_argument("--images", type=Path, help="the folder it was converted from")
    parser.add_argument("--workers", type=int, default=num_available_cores(), help="threads")
    return parser


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    if args.workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {args.workers}")
    num_problems = 0
    for problem in verify(args.beton, args.images, workers=args.workers):
        num_problems += 1
        if num_problems <= MAX_PRINTED:
            tqdm.write(problem)
    if num_problems > MAX_PRINTED:
        print(f"… and {num_problems - MAX_PRINTED} more")
    if num_problems:
        print(f"{args.beton}: {num_problems} problem{'s' * (num_problems > 1)}")
        return 1
    print(f"{args.beton}: proved against its manifest{f' and {args.images}' if args.images else ''}")
    return 0


if __name__ == "__main__":
    run(main)
