"""Bare pixels as image files: what CIFAR and STL hold, as PNG, which loses nothing.

Also finds the members of the archives in which these data sets are published.

Shapes: H height, W width.
"""

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def png(pixels: NDArray[np.uint8]) -> bytes:
    """RGB pixels uint8 [H, W, 3] as a PNG file, packed as fast as can be: it is unpacked at once."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@contextmanager
def archive_members(archive: Path, wanted: dict[str, int]) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Reads members of a `.tar.gz` one after the other.

    Args:
        archive: the file.
        wanted: base names, and the most bytes that each may have.

    Yields:
        (base name, stream) of those that are there; a stream is only good until the next.

    Raises:
        ValueError: it is no such archive, damaged, or a member is too large.
    """

    def members(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if name not in wanted or not member.isreg():
                continue
            if not 0 <= member.size <= wanted[name]:
                raise ValueError(f"{archive}: {name} must have at most {wanted[name]} bytes, found {member.size}")
            stream = tar.extractfile(member)
            assert stream is not None
            yield name, stream

    try:
        with tarfile.open(archive, "r|gz") as tar:
            yield members(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{archive} must be a .tar.gz, whole: {error}; download it again") from error


def chosen_split(given: str | None, splits: tuple[str, ...], path: Path) -> str:
    """The split that was asked for.

    Raises:
        ValueError: none was, or one that is not there.
    """
    if given in splits:
        return str(given)
    raise ValueError(
        f"{path} has the splits {', '.join(splits)}; choose one with --split"
        + (f", which must not be {given!r}" if given is not None else "")
    )
