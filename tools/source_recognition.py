"""Tells by what lies at a path in which format images come."""

from pathlib import Path
from typing import Literal

from tools.image_folder import IMAGE_SUFFIXES

Format = Literal["folder", "webdataset", "huggingface", "parquet", "cifar", "stl", "list"]

CIFAR_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")
CIFAR_ARCHIVES = (
    "cifar-10-python.tar.gz",
    "cifar-10-binary.tar.gz",
    "cifar-100-python.tar.gz",
    "cifar-100-binary.tar.gz",
)
STL_FOLDER = "stl10_binary"
STL_ARCHIVE = "stl10_binary.tar.gz"
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


def recognise(path: Path) -> Format:
    """The format of a file or folder. A folder that shows none of the others is a folder of images.

    Raises:
        ValueError: there is nothing, or a file of no known format.
        OSError: the folder cannot be listed.
    """
    if path.is_dir():
        return _of_known_folder(path) or _of_files(path)
    name = path.name.lower()
    if not path.exists() and not ("{" in name and ".tar" in name):
        raise ValueError(f"the source must be a folder of images or a data set's file, found none at {path}")
    by_suffix: dict[tuple[str, ...], Format] = {
        CIFAR_ARCHIVES: "cifar",
        (STL_ARCHIVE,): "stl",
        (".tar", ".tar.gz", ".tgz"): "webdataset",
        (".parquet",): "parquet",
        LIST_SUFFIXES: "list",
    }
    for suffixes, found in by_suffix.items():
        if name.endswith(suffixes):
            return found
    raise ValueError(
        f"the source must be a folder of images, or a .tar, .parquet, .csv or .jsonl file, found a file at {path}; "
        "if it is one of them, say so with --format"
    )


def _of_known_folder(path: Path) -> Format | None:
    """By the names that a package or a data set gives its files."""
    names = {path.name, *(entry.name for entry in path.iterdir())}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return "huggingface"
    if names & {*CIFAR_FOLDERS, *CIFAR_ARCHIVES}:
        return "cifar"
    return "stl" if names & {STL_FOLDER, STL_ARCHIVE} else None


def _of_files(path: Path) -> Format:
    """By the suffixes of the files directly inside."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    suffixes = {entry.suffix.lower() for entry in entries if not entry.is_dir()}
    if suffixes & IMAGE_SUFFIXES or len(folders) > 1:
        return "folder"
    if folders:  # the Hub lays the parquet files of a data set into one folder, beside its README
        inside = {entry.suffix.lower() for entry in folders[0].iterdir()}
        return "parquet" if ".parquet" in inside and not inside & IMAGE_SUFFIXES else "folder"
    if ".tar" in suffixes:
        return "webdataset"
    return "parquet" if ".parquet" in suffixes else "folder"
