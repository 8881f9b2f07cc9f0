"""Where a conversion writes: one `.beton`, or shards of it in folders with room, and whether they hold it all."""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipelines.beton_layout import ALLOCATION_DTYPE, DEFAULT_PAGE_SIZE
from pipelines.manifest import manifest_path
from pipelines.shard_index import INDEX_SUFFIX
from tools.beton_writer import forecast_bytes

FORECAST_MARGIN = 0.1
MIN_PAGES = 4  # of a shard: its tables, its images, and what pads them
SPARE_ROWS = 2.0  # room in a shard's tables, as a multiple of the rows that samples of the mean size would make
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the rows go."""

    dest: Path
    """The `.beton`, or the index of the shards."""
    shard_size: int | None = None
    """Bytes of a shard at most; None: one file."""
    shard_dirs: tuple[Path, ...] = ()
    """Folders for the shards, in the order in which they are filled; none: the index's."""
    page_size: int = DEFAULT_PAGE_SIZE

    def __post_init__(self) -> None:
        if self.dest.is_dir():
            raise ValueError(f"the destination {self.dest} is a folder; choose another name")
        if self.shard_size is None:
            if self.dest.name.endswith(INDEX_SUFFIX):
                raise ValueError(f"{self.dest} is the name of an index of shards; say --shard-size as well, as in 20GB")
            if self.dest.suffix != ".beton":
                raise ValueError(f"the destination must be named *.beton, got {self.dest}")
            if self.shard_dirs:
                raise ValueError("--shard-dirs are for shards; say --shard-size as well, as in 20GB")
            return
        if not self.dest.name.endswith(INDEX_SUFFIX):
            raise ValueError(f"the index of shards must be named *{INDEX_SUFFIX}, got {self.dest}")
        if self.shard_size < MIN_PAGES * self.page_size:
            raise ValueError(
                f"--shard-size must be at least {MIN_PAGES} pages of {human(self.page_size)}, "
                f"{human(MIN_PAGES * self.page_size)}, got {human(self.shard_size)}"
            )

    @property
    def folders(self) -> list[Path]:
        """Where files of images are written."""
        return list(self.shard_dirs) or [self.dest.parent]

    def shard_name(self, number: int) -> str:
        """The name of a shard, without its folder."""
        return f"{self.dest.name.removesuffix(INDEX_SUFFIX)}-{number:05d}.beton"

    def relative(self, folder: Path, name: str) -> str:
        """How the index names a file: from its own folder on where it lies below it, else in full."""
        place, own = folder.resolve(), self.dest.parent.resolve()
        return ((place.relative_to(own) if place.is_relative_to(own) else place) / name).as_posix()

    def capacity(self, num_images: int, mean_size: float) -> int:
        """Rows for which a file's tables have room."""
        if self.shard_size is None:
            return num_images
        return min(num_images, math.ceil(SPARE_ROWS * self.shard_size / max(mean_size, 1.0)))


def check_folders(places: Places, source: Path) -> None:
    """Refuses folders that cannot be written to.

    Raises:
        ValueError: one line.
    """
    for folder in {places.dest.parent: None, **dict.fromkeys(places.folders)}:
        if not folder.is_dir():
            raise ValueError(f"the destination's folder {folder} does not exist; create it")
        if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise ValueError(
                f"the destination {places.dest} lies inside the source folder {source}; choose another place"
            )


def check_names(places: Places, *, fresh: bool) -> None:
    """Refuses names that are taken.

    Args:
        places: where to write.
        fresh: no file of this conversion is there yet.

    Raises:
        ValueError: one line.
    """
    paths = [places.dest]
    if places.shard_size is None:
        paths.append(manifest_path(places.dest))
    elif fresh:
        paths += _shards_of(places)
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists; pass --force to replace it, or choose another name")


def needed_bytes(places: Places, num_images: int, mean_size: float, *, labelled: bool) -> int:
    """The forecast for all files together."""
    if places.shard_size is None:
        return forecast_bytes(num_images, mean_size, labelled=labelled, page_size=places.page_size)
    whole = forecast_bytes(num_images, mean_size, labelled=labelled, page_size=places.page_size)
    num_shards = max(1, -(-whole // places.shard_size))
    capacity = places.capacity(num_images, mean_size)
    tables = capacity * 24 - num_images // num_shards * ALLOCATION_DTYPE.itemsize  # room that rows do not fill
    return whole + num_shards * (max(tables, 0) + places.page_size)


def check_room(places: Places, needed: int, advice: str) -> None:
    """Refuses what cannot fit, with a margin.

    Raises:
        ValueError: one line with what is needed and what is free in each folder.
    """
    wanted = needed * (1 + FORECAST_MARGIN)
    free = {folder: shutil.disk_usage(folder).free for folder in places.folders}
    if places.shard_size is None:
        room = free[places.dest.parent]
    else:
        devices = {folder.stat().st_dev: free[folder] for folder in places.folders}
        room = sum(device // places.shard_size * places.shard_size for device in devices.values())
        room = max(room, *devices.values())  # a set that is smaller than a shard
    if wanted > room:
        shown = "; ".join(f"{human(left)} are free in {folder}" for folder, left in free.items())
        raise ValueError(
            f"{places.dest} needs about {human(needed)} and a margin of {FORECAST_MARGIN:.0%}, but only {shown}; "
            f"make room, {'name more --shard-dirs, ' if places.shard_size else ''}{advice}"
        )


def folder_with_room(places: Places, needed: int) -> Path:
    """The first folder that has room for a shard of so many bytes.

    Raises:
        OSError: none has.
    """
    if places.shard_size is None:
        return places.dest.parent
    wanted = min(places.shard_size, needed)
    free = {folder: shutil.disk_usage(folder).free for folder in places.folders}
    for folder, left in free.items():
        if left >= wanted:
            return folder
    shown = "; ".join(f"{human(left)} in {folder}" for folder, left in free.items())
    raise OSError(f"no folder has room for a shard of {human(wanted)} (free: {shown}); name one more in --shard-dirs")


def size_in_bytes(text: str) -> int:
    """Bytes of `20GB`, `512MiB`, `1e9`."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2]])
    except (ValueError, OverflowError):
        raise ValueError(f"--shard-size must be a number of bytes, such as 20GB or 512MiB, got {text!r}") from None


def human(num_bytes: float) -> str:
    """A number of bytes for people."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def _shards_of(places: Places) -> list[Path]:
    """Shards of this name that are there already."""
    stem = places.dest.name.removesuffix(INDEX_SUFFIX)
    form = re.compile(re.escape(stem) + r"-\d{5}\.beton\Z")
    return [path for folder in places.folders for path in sorted(folder.iterdir()) if form.match(path.name)]
