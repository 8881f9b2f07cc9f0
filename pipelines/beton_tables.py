"""The tables of a `.beton`, read from its bytes: nothing that they say is believed before its length bears it out.

Shapes: n samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.beton_layout import (
    ALLOCATION_DTYPE,
    FIELD_DTYPE,
    FIELD_METADATA,
    FORMAT_VERSION,
    HEADER_DTYPE,
    IMAGE_FIELD,
    INT_FIELD,
    MODE_JPEG,
    MODE_RAW,
    metadata_dtype,
    most_pixels,
)

ScalarT = TypeVar("ScalarT", bound=np.generic)


class BetonError(ValueError):
    """A file that is not a whole `.beton`: one line with its path, what was expected and what was found."""


class Tables(NamedTuple):
    """What the tables say; the arrays are read-only copies."""

    num_samples: int
    page_size: int
    modes: NDArray[np.uint8]
    """uint8 [n]: MODE_JPEG or MODE_RAW."""
    widths: NDArray[np.int32]
    """int32 [n], pixels."""
    heights: NDArray[np.int32]
    """int32 [n], pixels."""
    offsets: NDArray[np.int64]
    """int64 [n]: where the sample's bytes begin."""
    sizes: NDArray[np.int64]
    """int64 [n]: how many bytes they are."""
    labels: NDArray[np.int64] | None
    """int64 [n], or None where the file has no integer field."""


def read_tables(data: NDArray[np.uint8]) -> Tables:
    """The tables of a whole file's bytes, uint8.

    Raises:
        BetonError: they are torn or foreign, or state what cannot be true; without the file's name.
    """
    header = _read_header(data)
    num_samples, table_start = header["num_samples"], header["alloc_table_ptr"]

    fields_end = HEADER_DTYPE.itemsize + header["num_fields"] * FIELD_DTYPE.itemsize
    _require_room("the field descriptors", fields_end, table_start)
    type_ids = _field_types(data[HEADER_DTYPE.itemsize : fields_end].view(FIELD_DTYPE))

    row = metadata_dtype(type_ids)
    metadata_end = fields_end + num_samples * row.itemsize
    _require_room(f"the metadata of {num_samples} samples", metadata_end, table_start)
    metadata = data[fields_end:metadata_end].view(row)
    image = metadata[f"f{type_ids.index(IMAGE_FIELD)}"]
    labels = metadata[f"f{type_ids.index(INT_FIELD)}"] if INT_FIELD in type_ids else None

    sizes = _sample_sizes(image["data_ptr"], data[table_start:])
    _require_inside(image["data_ptr"], sizes, metadata_end, table_start)
    _require_images(image, sizes)
    return Tables(
        num_samples=num_samples,
        page_size=header["page_size"],
        modes=_column(image["mode"], np.uint8),
        widths=_column(image["width"], np.int32),
        heights=_column(image["height"], np.int32),
        offsets=_column(image["data_ptr"], np.int64),
        sizes=_column(sizes, np.int64),
        labels=None if labels is None else _column(labels, np.int64),
    )


def _read_header(data: NDArray[np.uint8]) -> dict[str, int]:
    record = data[: HEADER_DTYPE.itemsize].view(HEADER_DTYPE)[0]
    header = {name: int(record[name]) for name in HEADER_DTYPE.names or ()}
    version, page_size = header["version"], header["page_size"]
    if version != FORMAT_VERSION:
        raise BetonError(f"expected a .beton file of format version {FORMAT_VERSION}, found {version}")
    if page_size == 0 or page_size & (page_size - 1):
        raise BetonError(f"the page size must be a power of two, found {page_size}")
    if header["num_samples"] == 0:
        raise BetonError("expected at least one sample, found none")
    if header["alloc_table_ptr"] == 0:
        raise BetonError("half-written: the program that wrote it stopped before the allocation table")
    _require_room("the tables and the data", header["alloc_table_ptr"], data.size, "the file ends")
    return header


def _field_types(descriptors: NDArray[np.void]) -> list[int]:
    type_ids = [int(type_id) for type_id in descriptors["type_id"]]
    for type_id, name in zip(type_ids, descriptors["name"], strict=True):
        if type_id not in FIELD_METADATA:
            # 255 is a custom field: how long its metadata are, only the program that wrote it knows.
            shown = bytes(name).split(b"\0")[0].decode("ascii", "backslashreplace")
            raise BetonError(f"expected FFCV's own field types, 0 to 6, found {type_id} for field {shown!r}")
    if IMAGE_FIELD not in type_ids:
        raise BetonError(f"expected an RGB image field (type {IMAGE_FIELD}), found field types {type_ids}")
    return type_ids


def _sample_sizes(pointers: NDArray[np.uint64], table_bytes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Bytes of each sample, uint64 [n]: those of the allocation whose pointer is the image's."""
    if table_bytes.size % ALLOCATION_DTYPE.itemsize:
        raise BetonError(
            f"torn: the allocation table has {table_bytes.size} bytes, no multiple of an entry's "
            f"{ALLOCATION_DTYPE.itemsize}"
        )
    table = np.array(table_bytes.view(ALLOCATION_DTYPE))
    # FFCV's workers hand in their parts one after the other. An empty allocation (of a bytes field) shares
    # its pointer with the next one: sorted by size as well, the one that holds something comes last.
    if np.any(table["ptr"][1:] <= table["ptr"][:-1]):
        table = table[np.lexsort((table["size"], table["ptr"]))]
    if table.size == 0:
        raise BetonError("torn: the allocation table is missing")
    entry = np.maximum(np.searchsorted(table["ptr"], pointers, side="right"), 1) - 1
    found = (table["ptr"][entry] == pointers) & (table["sample_id"][entry] == np.arange(pointers.size))
    _require_all(found, lambda i: f"torn: the allocation table has no entry for sample {i}")
    sizes: NDArray[np.uint64] = table["size"][entry]
    return sizes


def _require_inside(pointers: NDArray[np.uint64], sizes: NDArray[np.uint64], data_start: int, data_end: int) -> None:
    # Unsigned sums may wrap around, hence sizes are compared with the room that is left.
    room = np.uint64(data_end) - np.minimum(pointers, np.uint64(data_end))
    _require_all(
        (pointers >= data_start) & (sizes <= room),
        lambda i: (
            f"torn: sample {i} has {sizes[i]} bytes from byte {pointers[i]} on, outside the data "
            f"(bytes {data_start} to {data_end})"
        ),
    )


def _require_images(image: NDArray[np.void], sizes: NDArray[np.uint64]) -> None:
    modes, widths, heights = image["mode"], image["width"], image["height"]
    pixels = widths.astype(np.uint64) * heights
    _require_all(
        (modes == MODE_JPEG) | (modes == MODE_RAW),
        lambda i: f"sample {i} must have mode {MODE_JPEG} (JPEG) or {MODE_RAW} (raw), found {modes[i]}",
    )
    _require_all(
        (pixels > 0) & (sizes > 0),
        lambda i: f"sample {i} is empty: {widths[i]}×{heights[i]} pixels in {sizes[i]} bytes",
    )
    _require_all(
        (modes != MODE_JPEG) | (pixels <= most_pixels(np.minimum(sizes, np.uint64(1 << 32)))),
        lambda i: f"sample {i} cannot be an image of {widths[i]}×{heights[i]} pixels in {sizes[i]} bytes",
    )
    _require_all(
        (modes != MODE_RAW) | (sizes == 3 * pixels),
        lambda i: (
            f"raw sample {i} of {widths[i]}×{heights[i]} pixels must have {3 * pixels[i]} bytes, found {sizes[i]}"
        ),
    )


def _require_all(ok: NDArray[np.bool_], message: Callable[[int], str]) -> None:
    if not ok.all():
        raise BetonError(message(int(np.argmin(ok))))


def _require_room(what: str, needed: int, end: int, limit: str = "the allocation table begins") -> None:
    if needed > end:
        raise BetonError(f"torn: {what} need {needed} bytes, but {limit} at byte {end}")


def _column(values: NDArray[Any], dtype: type[ScalarT]) -> NDArray[ScalarT]:
    """A contiguous read-only copy: the table itself lies unaligned in the map."""
    column = np.array(values, dtype=dtype)
    column.flags.writeable = False
    return column
