"""Converts images, or goes on with a conversion that was stopped: from a source, through threads, to files.

A conversion is a journal and the files that it speaks of; whatever ends it, the next call with the same arguments takes
up where the journal ends.
"""

import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipelines.manifest import Quarantined
from tools.beton_writer import check_page_size
from tools.convert_journal import Block, Journal, open_journal
from tools.convert_manifests import quarantine_path, write_index, write_quarantine
from tools.convert_output import Output, manifest_options, publish
from tools.convert_places import Places, check_folders, check_names, check_room, human, needed_bytes
from tools.convert_progress import Begun, Progress, begin_words, check_goes_on, discard, library_versions, read_progress
from tools.image_decoding import UnusableImage, codec_settings
from tools.image_encoding import EncodedImage, EncodeOptions, encode_image
from tools.image_source import ImageSource, SourceOptions, open_source
from tools.ordered_pool import OrderedMap, ordered_pool
from tools.source_recognition import recognise
from tools.whole_file import deferred_signals

FORECAST_SAMPLES = 200  # their mean is some 5 % off: file sizes spread by about two thirds of their mean


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion made."""

    num_samples: int
    num_new: int
    """Of them, those that this call converted; the others were done before."""
    num_bytes: int
    num_shards: int
    classes: list[str] | None
    class_counts: list[int] | None
    num_converted: int
    """Images that `--encode keep` had to convert."""
    num_quarantined: int


def convert_images(
    source: Path,
    places: Places,
    options: EncodeOptions,
    *,
    workers: int,
    format_options: SourceOptions | None = None,
    force: bool = False,
    restart: bool = False,
) -> Converted:
    """Converts images, or goes on where an earlier call with the same arguments was stopped or killed.

    Args:
        source: a folder of images, or what else `open_source` reads.
        places: where to write.
        options: how images are stored.
        workers: threads.
        format_options: what the source is.
        force: replace what is there.
        restart: begin anew, whatever an earlier call has done.

    Raises:
        ValueError: bad input; nothing was written (but the quarantine list, if it holds every file).
        OSError: a disk failed or is full; what was done is kept.
    """
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}")
    check_page_size(places.page_size)
    check_folders(places, source)
    with open_journal(places.dest.with_name(places.dest.name + ".journal")) as journal:
        progress = read_progress(journal)
        if restart and progress.begun is not None:
            is_whole = progress.is_written and places.dest.exists()
            discard(progress, places.dest.parent, whole=places.shard_size is not None and not is_whole)
            journal.clear()
            progress = Progress()
        if not (force or progress.is_written):
            check_names(places, fresh=progress.begun is None)
        format_options = format_options or SourceOptions()
        with closing(open_source(source, format_options)) as images, codec_settings(), ordered_pool(workers) as pool:
            begun = _begun(source, images, places, options, format_options)
            if progress.begun is None:
                _begin(images, places, options, begun, journal, progress, pool)
            else:
                check_goes_on(progress, begun, journal.path, places.dest.parent)
                _go_on(places, progress)
            num_before = progress.next_index - len(progress.quarantined)
            if not progress.is_written:
                _write_samples(images, places, options, begun, journal, progress, pool, force=force)
            return _conclude(source, images, places, begun, journal, progress, num_before)


def _begun(
    source: Path, images: ImageSource, places: Places, options: EncodeOptions, format_options: SourceOptions
) -> Begun:
    form = recognise(source) if format_options.format == "auto" else format_options.format
    stored: dict[str, str | int | None] = {**options.described(), "page_size": places.page_size}
    return Begun(
        images=images.identity(),
        num_images=len(images.names),
        options={**stored, "format": None if form == "folder" else form, "shard_size": places.shard_size},
        tools=library_versions(),
    )


def _begin(
    images: ImageSource,
    places: Places,
    options: EncodeOptions,
    begun: Begun,
    journal: Journal,
    progress: Progress,
    ordered_map: OrderedMap,
) -> None:
    """Encodes a few images to forecast the size, says it, and refuses what cannot fit."""
    total = begun.num_images
    num_tried = min(total, FORECAST_SAMPLES, 32 + total // 100)  # a small folder should not be converted twice
    few = random.Random(0).sample(range(total), num_tried)  # noqa: S311 — no secret
    results = [result for _, result in ordered_map(lambda index: _encode(images, index, options), few)]
    mean_size = sum(len(result.data) for result in results if isinstance(result, EncodedImage)) / len(few)
    forecast = needed_bytes(places, total, mean_size, labelled=images.labels is not None)
    print(
        f"{total} files, about {human(mean_size)} each; forecast {human(forecast)}, free {human(_free(places))}",
        file=sys.stderr,
    )
    check_room(places, forecast, "or lower --max-side or --quality")
    progress.begun, progress.mean_size = begun, mean_size
    journal.clear()
    journal.append(Block(kind="begin", words=begin_words(begun, mean_size)))


def _go_on(places: Places, progress: Progress) -> None:
    """Says how far it is, and refuses what cannot fit."""
    assert progress.begun is not None
    total = progress.begun.num_images
    left = int((total - progress.next_index) * progress.mean_size)
    print(
        f"going on with {places.dest}: {progress.next_index} of {total} files were done; the others need about "
        f"{human(left)}, free {human(_free(places))}",
        file=sys.stderr,
    )
    check_room(places, left, "and the same command goes on")


def _free(places: Places) -> int:
    return sum({folder.stat().st_dev: shutil.disk_usage(folder).free for folder in places.folders}.values())


def _write_samples(
    images: ImageSource,
    places: Places,
    options: EncodeOptions,
    begun: Begun,
    journal: Journal,
    progress: Progress,
    ordered_map: OrderedMap,
    *,
    force: bool,
) -> None:
    with _what_is_kept(places, progress, begun.num_images):
        output = Output(images, places, begun, journal, progress, force=force)
        with closing(output), deferred_signals() as signals:
            try:
                indices = range(progress.next_index, begun.num_images)
                results = ordered_map(lambda index: _encode(images, index, options), indices)
                bar = tqdm(results, initial=indices.start, total=begun.num_images, unit="img", disable=None)
                for index, result in bar:
                    output.add(index, result)
                    signals.act()
                output.finish()
            except BaseException:
                output.keep()
                raise


@contextmanager
def _what_is_kept(places: Places, progress: Progress, total: int) -> Iterator[None]:
    """Says of whatever ends the block early that the work is not lost."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{places.dest}: {error.strerror or error}, after {progress.next_index} of {total} files; what was done is "
            "kept: put that right, and the same command goes on"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped after {progress.next_index} of {total} files; the same command goes on", file=sys.stderr)
        raise


def _encode(images: ImageSource, index: int, options: EncodeOptions) -> EncodedImage | Quarantined:
    try:
        return encode_image(images.read(index), options)
    except UnusableImage as unusable:
        return Quarantined(file=images.names[index], reason=str(unusable))


def _conclude(
    source: Path,
    images: ImageSource,
    places: Places,
    begun: Begun,
    journal: Journal,
    progress: Progress,
    num_before: int,
) -> Converted:
    """The last steps. Killed between any two of them, they are taken again."""
    shards, dest = progress.done, places.dest
    quarantined = list(images.strays)
    quarantined += [Quarantined(file=images.names[index], reason=reason) for index, reason in progress.quarantined]
    for shard in shards:
        publish(places, shard["name"])
    write_quarantine(dest, quarantined)
    if not shards:
        journal.remove()
        raise ValueError(
            f"none of the {len(quarantined)} files in {source} can be used ({quarantined[0].file!r} "
            f"{quarantined[0].reason}); all are listed in {quarantine_path(dest)}"
        )
    if places.shard_size is not None:
        write_index(
            dest,
            shards=shards,
            classes=images.classes,
            options=manifest_options(begun),
            num_quarantined=len(quarantined),
        )
    journal.remove()
    num_samples = sum(shard["num_samples"] for shard in shards)
    counts = [shard["class_counts"] for shard in shards] if images.classes is not None else None
    return Converted(
        num_samples=num_samples,
        num_new=num_samples - num_before,
        num_bytes=sum(shard["num_bytes"] for shard in shards),
        num_shards=len(shards),
        classes=images.classes,
        class_counts=[sum(by_shard) for by_shard in zip(*counts, strict=True)] if counts is not None else None,
        num_converted=sum(shard["num_converted"] for shard in shards),
        num_quarantined=len(quarantined),
    )
