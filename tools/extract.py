"""The representations of images as a file: `python -m tools.extract --checkpoint RUN --data SET --out features.npz`.

    features  float32 [n, D], or [n, E] of the projection head
    names     n names, as the manifest or the folder has them; row numbers where neither knows
    labels    int64 [n]; −1 where an image has none
    classes   names by label; empty where there are none

`.npz` is NumPy's; `.parquet` has the columns name, label and features, and the classes in its metadata. The images need
no labels. Representations are those that evaluations use, and share their cache: docs/guides/evaluation.md.

Exit codes: 0 written; 2 bad input, and then nothing was written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

# Read once, when torch is loaded: its threads soon sleep where they wait for one another (see train/evaluate.py).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
from jsonargparse import ArgumentParser, set_parsing_settings
from numpy.typing import NDArray

from pipelines.beton import Beton
from pipelines.folder_dataset import list_images
from pipelines.manifest import load_manifest
from tools.whole_file import clean_termination, whole_file
from train.cli import UnfitEnvironment, parse, run
from train.evaluation.extractor import Extractor, ExtractorConfig
from train.evaluation.labelled_data import LabelledData, open_images

SUFFIXES = (".npz", ".parquet")
ROWS_A_PIECE = 4096  # that are written to a Parquet file at a time


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ExtractorConfig):
    """What is extracted, and to where."""

    data: str
    """The images: a `.beton`, the index of a set in shards, or a folder."""
    out: str
    """The file to write, `.npz` or `.parquet`; one of that name is replaced."""
    head_layers: int = 0
    """Layers of the projection head that are kept: 0 gives h, the encoder's output; −1 all of them, z."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.head_layers < -1:
            raise ValueError(f"`head_layers` must be −1 (all) or more, got {self.head_layers}; 0 is h")
        if Path(self.out).suffix not in SUFFIXES:
            raise ValueError(f"`out` must end in {' or '.join(SUFFIXES)}, got {self.out}")
        if not Path(self.out).parent.is_dir():
            raise ValueError(f"the folder of `out` must exist, {Path(self.out).parent} does not; create it")


@dataclass(frozen=True, kw_only=True, eq=False)
class Extracted:
    """What is written."""

    features: NDArray[np.float32]
    """[n, D]."""
    names: list[str]
    """n."""
    labels: NDArray[np.int64]
    """[n]; −1 where there is none."""
    classes: list[str]
    """Names by label, or none."""


def extract(config: ExtractConfig) -> Extracted:
    """Compute the representations, or take them from the cache, and write the file.

    Raises:
        ValueError, OSError: the checkpoint or the images cannot be used; nothing was written.
        UnfitEnvironment: the package that writes the file is not installed.
    """
    write = _write_npz if config.out.endswith(".npz") else _parquet_writer()
    data = open_images(config.data)
    extractor = Extractor(config)
    values, labels = extractor.representations(data, (config.head_layers,))[config.head_layers]
    extracted = Extracted(
        features=values.numpy(), names=_names(data), labels=labels.numpy(), classes=list(data.classes or [])
    )
    with whole_file(Path(config.out)) as file:
        write(file, extracted)
    return extracted


def _names(data: LabelledData) -> list[str]:
    if isinstance(data.data, Beton):
        manifest = load_manifest(data.data.path)
        return manifest.files if manifest else [str(row) for row in range(data.data.num_samples)]
    root = data.data.root
    return [Path(file).relative_to(root).as_posix() for file, _ in list_images(root)]


def _write_npz(file: BinaryIO, extracted: Extracted) -> None:
    names, classes = np.array(extracted.names, np.str_), np.array(extracted.classes, np.str_)
    np.savez(file, features=extracted.features, names=names, labels=extracted.labels, classes=classes)


def _parquet_writer() -> Any:
    """What writes a Parquet file; asked for before anything is computed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UnfitEnvironment(
            "`out` .parquet needs pyarrow, which is not installed; `pip install -r requirements-formats.txt`, or write "
            "an .npz"
        ) from error

    def write(file: BinaryIO, extracted: Extracted) -> None:
        width = extracted.features.shape[1]
        schema = pa.schema(
            [("name", pa.string()), ("label", pa.int64()), ("features", pa.list_(pa.float32(), width))],
            metadata={"classes": json.dumps(extracted.classes)},
        )
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, len(extracted.names), ROWS_A_PIECE):
                rows = slice(start, start + ROWS_A_PIECE)
                flat = pa.array(np.ascontiguousarray(extracted.features[rows]).reshape(-1))
                # A file's name may hold bytes that are no text; Parquet's strings may not.
                names = [name.encode("utf-8", "backslashreplace").decode() for name in extracted.names[rows]]
                columns = [pa.array(names), pa.array(extracted.labels[rows])]
                columns.append(pa.FixedSizeListArray.from_arrays(flat, width))
                writer.write_table(pa.table(columns, schema=schema))

    return write


def parse_extract(arguments: list[str] | None = None) -> ExtractConfig:
    """Read the command line.

    Raises:
        ValueError: an unknown option, or a value outside its choices; one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="python -m tools.extract",
        description="The representations of images, labelled or not, as an .npz or .parquet file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(ExtractConfig)
    values = parser.instantiate(parse(parser, list(sys.argv[1:] if arguments is None else arguments)))
    return ExtractConfig(**{field.name: values[field.name] for field in fields(ExtractConfig)})


def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse_extract()
    with clean_termination():
        extracted = extract(config)
    num, width = extracted.features.shape
    print(f"{config.out}: {num} images, {width} features each")


if __name__ == "__main__":
    run(main)
