"""Proves a `.beton` against its manifest and, given the images, against what it was made of.

    python -m tools.verify train.beton [--images photos]
    python -m tools.verify train.shards.json

Always: the tables are sound, the file's SHA-256 and each sample's CRC-32 are the manifest's, every sample
decodes whole to its stated size, labels and counts agree; of a set in shards, each of them, and the index. With
`--images`: the source holds the same images in the same classes, and each is encoded anew and compared: kept and
raw samples byte for byte; re-encoded ones too, or, where library versions differ, by pixels (PSNR of at least
40 dB).

Exit codes: 0 proved; 1 at least one thing is wrong, all are printed by sample and file; 2 bad usage.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.beton import Beton, BetonError, open_beton
from pipelines.manifest import Manifest, ManifestError, file_sha256, load_manifest, manifest_path
from pipelines.shard_index import Shard, ShardIndexError, is_shard_index, load_shard_index
from tools.image_decoding import codec_settings
from tools.image_source import SourceOptions, add_source_arguments, open_source, source_options
from tools.ordered_pool import OrderedMap, num_available_cores, ordered_pool
from tools.verify_samples import NamedImages, check_samples, encode_options, sample_name
from train.cli import run

MAX_PRINTED = 100


def verify(
    path: Path, images: Path | None = None, *, workers: int, format_options: SourceOptions | None = None
) -> Iterator[str]:
    """Yields one line for each thing that is wrong; nothing if the file is proved.

    Args:
        path: a `.beton`, or the index of a set in shards.
        images: what it was converted from.
        workers: threads.
        format_options: what `images` are.

    Raises:
        ValueError: there is no such file, or `images` holds none.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with codec_settings(), ordered_pool(workers) as ordered_map:
        if images is None:
            yield from _verify_set(path, None, ordered_map)
            return
        with closing(open_source(images, format_options or SourceOptions())) as source:
            rows = {name: index for index, name in enumerate(source.names)}
            yield from _verify_set(path, NamedImages(source=source, rows=rows), ordered_map)


def _verify_set(path: Path, images: NamedImages | None, ordered_map: OrderedMap) -> Iterator[str]:
    manifests: list[Manifest] = []
    if not is_shard_index(path):
        yield from _verify_file(path, images, ordered_map, manifests)
        if manifests and images:
            yield from _check_names(manifests[0].classes, manifests, images)
        return
    try:
        shards = load_shard_index(path).shards
    except ShardIndexError as error:
        yield str(error)
        return
    for shard in shards:
        yield from _verify_shard(shard, path, images, ordered_map, manifests)
    if len(manifests) == len(shards):
        content = json.loads(path.read_bytes())
        yield from _check_index(content, manifests)
        if images:
            yield from _check_names(content.get("classes"), manifests, images)


def _verify_shard(
    shard: Shard, index: Path, images: NamedImages | None, ordered_map: OrderedMap, manifests: list[Manifest]
) -> Iterator[str]:
    """Appends its manifest to `manifests` if it has a sound one."""
    if not shard.path.is_file():
        yield f"{shard.path}: no such file; if the shard was moved, write its new place into {index}"
        return
    num_before = len(manifests)
    for problem in _verify_file(shard.path, images, ordered_map, manifests):
        yield problem if str(shard.path) in problem else f"{shard.path}: {problem}"
    for manifest in manifests[num_before:]:
        for name in ("num_bytes", "num_samples", "sha256"):
            found, expected = getattr(manifest, name), getattr(shard, name)
            if found != expected:
                yield f"{shard.path}: its {name} is {found}, in {index} {expected}; it is another file"


def _verify_file(
    path: Path, images: NamedImages | None, ordered_map: OrderedMap, manifests: list[Manifest]
) -> Iterator[str]:
    """Appends its manifest to `manifests` if it has a sound one."""
    try:
        beton = open_beton(path)
        manifest = load_manifest(path)
    except (BetonError, ManifestError) as error:
        yield str(error)
        return
    if manifest is None:
        yield f"{manifest_path(path)}: no such file; only the tables and the samples are checked"
    else:
        if manifest.num_samples != beton.num_samples:
            yield f"the manifest has {manifest.num_samples} samples, the file {beton.num_samples}"
            return
        if images:
            try:
                encode_options(manifest)
            except (KeyError, TypeError, ValueError) as error:
                yield f"{manifest_path(path)}: its options cannot be understood ({error})"
                return
        manifests.append(manifest)
    yield from _check_tables(path, beton, manifest)
    yield from check_samples(beton, manifest, images, ordered_map)


def _check_index(content: dict[str, Any], manifests: list[Manifest]) -> Iterator[str]:
    classes, counts = content.get("classes"), content.get("class_counts")
    for number, manifest in enumerate(manifests):
        if manifest.classes != classes:
            yield f"shard {number} has the classes {manifest.classes}, the index {classes}"
    by_shard = [manifest.class_counts or [] for manifest in manifests]
    if len({len(found) for found in by_shard}) == 1:
        summed = [sum(column) for column in zip(*by_shard, strict=True)]
        if summed != (counts or []):
            yield f"the classes have {summed} samples, by the index {counts}"
    num_quarantined = sum(len(manifest.quarantined) for manifest in manifests)
    if content.get("quarantined") != num_quarantined:
        yield f"the manifests list {num_quarantined} files in quarantine, the index {content.get('quarantined')}"


def _check_tables(path: Path, beton: Beton, manifest: Manifest | None) -> Iterator[str]:
    last = beton.offsets + beton.sizes - 1
    for row in np.flatnonzero(beton.offsets // beton.page_size != last // beton.page_size).tolist():
        yield f"{sample_name(manifest, row)} crosses a page boundary; FFCV's page cache would misread it"
    if manifest is None:
        return
    with path.open("rb") as file:
        sha256 = file_sha256(file)
    if sha256 != manifest.sha256:
        yield f"the file's sha256 is {sha256}, the manifest's {manifest.sha256}"
    if manifest.classes is None or beton.labels is None:
        if (manifest.classes is None) != (beton.labels is None):
            yield "one of the file and the manifest has labels, the other has none"
        return
    names = dict(enumerate(manifest.classes))
    # Of a folder the names tell the classes; in other sources they need not.
    for row, label in enumerate(beton.labels.tolist()) if "format" not in manifest.options else ():
        expected, found = manifest.files[row].split("/")[0], names.get(label)
        if found != expected:
            yield f"{sample_name(manifest, row)} has label {label}, class {found!r}, but lies in {expected!r}"
    found_counts = dict(zip(*(column.tolist() for column in np.unique(beton.labels, return_counts=True)), strict=True))
    counts = [found_counts.get(label, 0) for label in names]
    if counts != manifest.class_counts:
        yield f"the classes have {counts} samples, by the manifest {manifest.class_counts}"


def _check_names(classes: list[str] | None, manifests: list[Manifest], images: NamedImages) -> Iterator[str]:
    if images.source.classes != classes:
        yield f"the images have the classes {images.source.classes}, the manifest {classes}"
    known = {name for manifest in manifests for name in manifest.files}
    known |= {entry.file for manifest in manifests for entry in manifest.quarantined}
    present = {*images.rows, *(entry.file for entry in images.source.strays)}
    yield from (f"{name!r} is among the images, but not in the manifest" for name in sorted(present - known))
    yield from (f"{name!r} is in the manifest, but not among the images" for name in sorted(known - present))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify",
        description="Prove a .beton, or a set in shards, against its manifest and, given them, against the images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("beton", type=Path, help="the .beton file, its manifest beside it; or the .shards.json")
    parser.add_argument("--images", type=Path, help="what it was converted from")
    parser.add_argument("--workers", type=int, default=num_available_cores(), help="threads")
    add_source_arguments(parser)
    return parser


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    if args.workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {args.workers}")
    num_problems = 0
    for problem in verify(args.beton, args.images, workers=args.workers, format_options=source_options(args)):
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
