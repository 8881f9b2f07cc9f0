"""Converts images to one `.beton`, or to shards of it: `python -m tools.convert photos train.beton`.

Beside `train.beton` it writes the manifest `train.beton.json` and, if files had to be left out, their names
and reasons in `train.beton.quarantine.jsonl`. Each appears under its name only once it is whole. The same
images, options and library versions give the same bytes, whatever the number of workers.

A conversion that was stopped, or killed, goes on by the same command and ends with the same bytes: until it is
done a journal, `train.beton.journal`, lies beside the file.

Exit codes: 0 done, also with files in quarantine; 2 bad input, or a disk that failed or is full; 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

import argparse
import time
from pathlib import Path
from typing import get_args

from pipelines.beton_layout import DEFAULT_PAGE_SIZE
from pipelines.manifest import Manifest, load_manifest
from tools.convert_images import Converted, convert_images
from tools.convert_manifests import quarantine_path
from tools.convert_places import Places, human, size_in_bytes
from tools.image_encoding import Colors, EncodeOptions, Encoding
from tools.image_source import add_source_arguments, source_options
from tools.ordered_pool import num_available_cores
from tools.whole_file import clean_termination
from train.cli import run

__all__ = ["Converted", "convert", "convert_images", "quarantine_path"]


def convert(
    source: Path,
    dest: Path,
    options: EncodeOptions,
    *,
    workers: int,
    page_size: int = DEFAULT_PAGE_SIZE,
    force: bool = False,
) -> Manifest:
    """Converts the images at `source` to the `.beton` file `dest`; see `convert_images`."""
    convert_images(source, Places(dest=dest, page_size=page_size), options, workers=workers, force=force)
    manifest = load_manifest(dest)
    assert manifest is not None
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description="Convert images to one .beton file, which Twinview and FFCV read, or to several.",
        epilog="Files that cannot be used are listed with the reason in DEST.quarantine.jsonl; DEST.json "
        "names classes, files, options and checksums. Check the result with `python -m tools.verify`. A conversion "
        "that was stopped goes on by the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="a folder with one folder of images per class, or a data set's files")
    parser.add_argument("dest", type=Path, help="the .beton file to write, or with --shard-size NAME.shards.json")
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
    parser.add_argument(
        "--colors",
        choices=get_args(Colors),
        default="stored",
        help="stored: numbers as in the file; srgb: convert what is not kept from its RGB profile (phones' Display P3)",
    )
    parser.add_argument("--workers", type=int, default=num_available_cores(), help="threads")
    parser.add_argument(
        "--page-size",
        type=int,
        default=DEFAULT_PAGE_SIZE,
        help="bytes, a power of two; pages grow if one sample is larger",
    )
    parser.add_argument("--shard-size", metavar="SIZE", help="write several files of at most so many bytes, as in 20GB")
    parser.add_argument(
        "--shard-dirs", metavar="DIR", type=Path, nargs="+", default=[], help="folders for them, filled in this order"
    )
    parser.add_argument("--force", action="store_true", help="replace DEST if it exists")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew; drop what a stopped conversion to DEST has done"
    )
    add_source_arguments(parser)
    return parser


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    places = Places(
        dest=args.dest,
        shard_size=None if args.shard_size is None else size_in_bytes(args.shard_size),
        shard_dirs=tuple(args.shard_dirs),
        page_size=args.page_size,
    )
    start = time.perf_counter()
    with clean_termination():
        made = convert_images(
            args.source,
            places,
            EncodeOptions(encode=args.encode, max_side=args.max_side, quality=args.quality, colors=args.colors),
            workers=args.workers,
            format_options=source_options(args),
            force=args.force,
            restart=args.restart,
        )
    print(_report(args.dest, made, time.perf_counter() - start))
    return 0


def _report(dest: Path, made: Converted, seconds: float) -> str:
    classes = f"{len(made.classes)} classes" if made.classes is not None else "no labels"
    if num_empty := (made.class_counts or []).count(0):
        classes += f" ({num_empty} without a usable image)"
    shards = f" in {made.num_shards} shards" if dest.suffix != ".beton" else ""
    converted = f"; {made.num_converted} could not be kept and were converted" if made.num_converted else ""
    quarantine = f"quarantined {made.num_quarantined}"
    if made.num_quarantined:
        quarantine += f" → {quarantine_path(dest)}"
    return (
        f"{dest}: {made.num_samples} images{shards}, {classes}, {human(made.num_bytes)}, "
        f"{made.num_new / seconds:.0f} images/s{converted}; {quarantine}"
    )


if __name__ == "__main__":
    run(main)
