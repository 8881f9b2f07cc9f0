"""The texts that a conversion writes: the manifest of each file, the index of shards, the list of what was left out.

A manifest of a hundred million names must not stand in memory as one text, hence it is written in pieces.

Shapes: n rows.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import Manifest, Quarantined
from pipelines.shard_index import INDEX_FORMAT, INDEX_FORMAT_VERSION
from tools.whole_file import partial_path, whole_file

NAMES_AT_A_TIME = 1 << 16
_EMPTY_LISTS = ' "files": [],\n "crc32": []\n}\n'


def write_partial_manifest(path: Path, manifest: Manifest, names: Sequence[str], rows: NDArray[np.void]) -> None:
    """Writes `<path>.partial` and waits until it is on the disk.

    Args:
        path: where the manifest will lie.
        manifest: what it says, without names and checksums.
        names: of all images of the source.
        rows: `ROW_DTYPE` [n], n > 0.
    """
    text = manifest.to_json()
    assert text.endswith(_EMPTY_LISTS)
    with partial_path(path).open("w", encoding="ascii") as file:
        file.write(text.removesuffix(_EMPTY_LISTS))
        file.write(' "files": [\n  ')
        file.writelines(_pieces(rows["index"], lambda index: json.dumps(names[index])))
        file.write('\n ],\n "crc32": [\n  ')
        file.writelines(_pieces(rows["crc32"], str))
        file.write("\n ]\n}\n")
        file.flush()
        os.fsync(file.fileno())


def write_index(
    path: Path,
    *,
    shards: list[dict[str, Any]],
    classes: list[str] | None,
    options: dict[str, Any],
    num_quarantined: int,
) -> None:
    """Writes the index of shards, whole or not at all."""
    counts = np.sum([shard["class_counts"] for shard in shards], axis=0).tolist() if classes is not None else None
    content = {
        "format": INDEX_FORMAT,
        "format_version": INDEX_FORMAT_VERSION,
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "classes": classes,
        "class_counts": counts,
        "options": options,
        "shards": [
            {"path": shard["name"], **{key: shard[key] for key in ("num_bytes", "num_samples", "sha256")}}
            for shard in shards
        ],
        "quarantined": num_quarantined,
    }
    with whole_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def quarantine_path(dest: Path) -> Path:
    """Where the files that could not be used are listed, one JSON object a line."""
    return dest.with_name(dest.name + ".quarantine.jsonl")


def write_quarantine(dest: Path, quarantined: Sequence[Quarantined]) -> None:
    """Replaces the list of an earlier conversion."""
    path = quarantine_path(dest)
    if not quarantined:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as file:
        for entry in quarantined:
            file.write((json.dumps(asdict(entry)) + "\n").encode())


def _pieces(values: NDArray[Any], text: Any) -> Iterator[str]:
    for start in range(0, values.size, NAMES_AT_A_TIME):
        yield ",\n  " * (start > 0) + ",\n  ".join(map(text, values[start : start + NAMES_AT_A_TIME].tolist()))
