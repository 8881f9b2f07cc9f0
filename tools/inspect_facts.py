"""What the tables of a `.beton`, or of a set in shards, say, and what follows from them for loading it.

Shapes: n samples, C classes.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.beton import MODE_JPEG, MODE_RAW, Beton, open_beton
from pipelines.beton_layout import FIELD_DTYPE, HEADER_DTYPE, IMAGE_FIELD, INT_FIELD, metadata_dtype
from pipelines.beton_memory import JPEG_BYTES, RAW_BYTES
from pipelines.manifest import Manifest
from tools.image_decoding import UnusableImage
from tools.verify_samples import sample_pixels

FORMAT, FORMAT_VERSION = "twinview-inspection", 1
FIELD_NAMES = {0: "float", INT_FIELD: "int", IMAGE_FIELD: "image", 3: "bytes", 4: "array", 5: "json", 6: "tensor"}
QUANTILES = {"min": 0, "5 %": 5, "median": 50, "95 %": 95, "max": 100}
NUM_EXTREMES = 5
NUM_REASONS = 10
LIGHT_PIXELS, MEDIUM_PIXELS = 256 * 256, 500 * 500
DECODE_SECONDS = 1.0  # are spent at most on measuring how fast samples decode
MAX_DECODED = 200


def inspect(beton: Beton, manifest: Manifest | None) -> dict[str, Any]:
    """Everything that is shown, as JSON types."""
    num_pixels = beton.widths.astype(np.int64) * beton.heights
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "path": str(beton.path),
        "num_samples": beton.num_samples,
        "num_bytes": sum(stamp.num_bytes for stamp in beton.stamps),
        "files": [_file(stamp.path) for stamp in beton.stamps],
        "modes": {"jpeg": int((beton.modes == MODE_JPEG).sum()), "raw": int((beton.modes == MODE_RAW).sum())},
        "bytes": _spread(beton.sizes),
        "width": _spread(beton.widths),
        "height": _spread(beton.heights),
        "largest": _extremes(beton, manifest, -beton.sizes),
        "smallest": _extremes(beton, manifest, beton.sizes),
        "most_pixels": _extremes(beton, manifest, -num_pixels),
        "classes": _classes(beton, manifest),
        "manifest": None if manifest is None else _of_manifest(manifest),
        "decoding": _decoding(beton, num_pixels),
    }


def row_facts(beton: Beton, manifest: Manifest | None, row: int) -> dict[str, Any]:
    """One sample."""
    label = None if beton.labels is None else int(beton.labels[row])
    classes = manifest.classes if manifest is not None else None
    named = classes is not None and label is not None and 0 <= label < len(classes)
    return {
        "row": row,
        "name": None if manifest is None else manifest.files[row],
        "label": label,
        "class": classes[label] if named and classes is not None and label is not None else None,
        "mode": "raw" if beton.modes[row] == MODE_RAW else "jpeg",
        "width": int(beton.widths[row]),
        "height": int(beton.heights[row]),
        "bytes": int(beton.sizes[row]),
    }


def _file(path: Path) -> dict[str, Any]:
    """One file: its header, its fields, and where its bytes go."""
    beton = open_beton(path)
    header = beton.data[: HEADER_DTYPE.itemsize].view(HEADER_DTYPE)[0]
    fields_end = HEADER_DTYPE.itemsize + int(header["num_fields"]) * FIELD_DTYPE.itemsize
    descriptors = beton.data[HEADER_DTYPE.itemsize : fields_end].view(FIELD_DTYPE)
    types = [int(type_id) for type_id in descriptors["type_id"]]
    names = [bytes(name).split(b"\0")[0].decode("ascii", "backslashreplace") for name in descriptors["name"]]
    tables_end = fields_end + beton.num_samples * metadata_dtype(types).itemsize
    data_end = int(header["alloc_table_ptr"])
    first, last = beton.offsets // beton.page_size, (beton.offsets + beton.sizes - 1) // beton.page_size
    in_order = np.argsort(beton.offsets, kind="stable")
    ends = (beton.offsets + beton.sizes)[in_order]
    samples = int(beton.sizes.sum())
    return {
        "path": str(path),
        "num_bytes": int(beton.data.size),
        "num_samples": beton.num_samples,
        "format_version": int(header["version"]),
        "fields": [{"name": name, "type": FIELD_NAMES[type_id]} for name, type_id in zip(names, types, strict=True)],
        "page_size": beton.page_size,
        "num_pages": int(np.unique(first).size),
        "first_sample_at": int(beton.offsets.min()),
        "table_bytes": tables_end + int(beton.data.size) - data_end,
        "sample_bytes": samples,
        "other_bytes": data_end - tables_end - samples,
        "samples_across_pages": int((first != last).sum()),
        "samples_that_overlap": int((beton.offsets[in_order][1:] < np.maximum.accumulate(ends)[:-1]).sum()),
        "is_in_order": bool(np.all(beton.offsets[1:] > beton.offsets[:-1])),
    }


def _spread(values: NDArray[Any]) -> dict[str, float]:
    found = np.percentile(values, list(QUANTILES.values()), method="nearest").tolist()
    return dict(zip(QUANTILES, found, strict=True)) | {"mean": round(float(values.mean()), 1)}


def _extremes(beton: Beton, manifest: Manifest | None, key: NDArray[Any]) -> list[dict[str, Any]]:
    rows = np.argsort(key, kind="stable")[:NUM_EXTREMES]
    return [row_facts(beton, manifest, int(row)) for row in rows]


def _classes(beton: Beton, manifest: Manifest | None) -> list[dict[str, Any]] | None:
    if beton.labels is None:
        return None
    counts = Counter(beton.labels.tolist())
    names = manifest.classes if manifest is not None and manifest.classes is not None else []
    labels = sorted({*counts, *range(len(names))})
    return [
        {"label": label, "name": names[label] if 0 <= label < len(names) else None, "count": counts[label]}
        for label in labels
    ]


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    # What stands before the colon is the reason; behind it, where this file was damaged.
    reasons = Counter(entry.reason.split(":")[0] for entry in manifest.quarantined)
    return {
        "sha256": manifest.sha256,
        "options": manifest.options,
        "tools": manifest.tools,
        "num_converted": manifest.num_converted,
        "num_quarantined": len(manifest.quarantined),
        "quarantine_reasons": dict(reasons.most_common(NUM_REASONS)),
        "quarantined": [[entry.file, entry.reason] for entry in manifest.quarantined[:NUM_REASONS]],
    }


def _decoding(beton: Beton, num_pixels: NDArray[np.int64]) -> dict[str, Any]:
    is_raw = beton.modes == MODE_RAW
    typical = float(np.median(num_pixels))
    if is_raw.all():
        kind = "raw"
    elif typical <= LIGHT_PIXELS:
        kind = "light"
    else:
        kind = "medium" if typical <= MEDIUM_PIXELS else "heavy"
    return {
        "class": kind,
        "images_per_sec_per_core": _decoded_per_second(beton),
        "bytes_per_thread": int((num_pixels * np.where(is_raw, RAW_BYTES, JPEG_BYTES)).max()),
        "pixel_bytes": int(3 * num_pixels.sum()),
    }


def _decoded_per_second(beton: Beton) -> float | None:
    """Whole images decoded on one thread, from samples spread over the set; None if none can be."""
    rows = np.unique(np.linspace(0, beton.num_samples - 1, min(beton.num_samples, MAX_DECODED)).astype(int)).tolist()
    seconds, num_done = 0.0, 0
    for row in rows:
        data = beton.encoded(row).tobytes()  # read first: the disk is not what is measured
        start = time.perf_counter()
        try:
            sample_pixels(beton, row, data).sum()
        except UnusableImage:
            continue
        seconds, num_done = seconds + time.perf_counter() - start, num_done + 1
        if seconds > DECODE_SECONDS:
            break
    return round(num_done / seconds, 1) if num_done else None
