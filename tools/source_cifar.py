"""CIFAR-10 and CIFAR-100 as they are published and as torchvision downloads them, unpacked or in their `.tar.gz`.

There is a Python and a binary version. The former is made of pickles, which may run any code when they are loaded. Here
nothing but lists, dicts, texts and the bytes of one kind of array comes out of them.

Shapes: n images, uint8 [n, 3, 32, 32].
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.manifest import Quarantined
from tools.source_pixels import archive_members, chosen_split, png
from tools.source_rows import file_facts, fingerprint, rows_facts

SHAPE = (3, 32, 32)
NUM_PIXEL_BYTES = 3 * 32 * 32
MAX_PART_BYTES = 1 << 28  # the largest, CIFAR-100's training images, has 155 MB


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One of the published forms."""

    folder: str
    archive: str
    parts: dict[str, tuple[str, ...]]
    """Split → its files, in order."""
    meta: str
    """The file with the classes' names."""
    names_key: str = ""
    """Python version: where they are in it."""
    label_key: str = ""
    """Python version: where the labels are."""
    num_label_bytes: int = 0
    """Binary version: bytes before an image's pixels, of which the last is the label."""


_VERSIONS = (
    _Version(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        parts={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        meta="batches.meta",
        names_key="label_names",
        label_key="labels",
    ),
    _Version(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        parts={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        meta="batches.meta.txt",
        num_label_bytes=1,
    ),
    _Version(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        parts={"train": ("train",), "test": ("test",)},
        meta="meta",
        names_key="fine_label_names",
        label_key="fine_labels",
    ),
    _Version(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        parts={"train": ("train.bin",), "test": ("test.bin",)},
        meta="fine_label_names.txt",
        num_label_bytes=2,
    ),
)


class CifarSource:
    """The images of a split in torchvision's order, as PNG. CIFAR-100's labels are the fine ones.

    Args:
        path: the archive, the unpacked folder, or the folder that torchvision was given, with either in it.
        split: train or test.
        labelled: False leaves labels out.

    Raises:
        ValueError: no CIFAR there, more than one, no split, or damaged files; one line.
        OSError: they cannot be read.
    """

    def __init__(self, path: Path, *, split: str | None, labelled: bool) -> None:
        self._place, version = _find(path)
        split = chosen_split(split, tuple(version.parts), path)
        files = _read(self._place, version, version.parts[split])
        pixels, labels = [], []
        for file in version.parts[split]:
            unpack = _unpickled_part if version.label_key else _binary_part
            part_pixels, part_labels = unpack(files[file], version, f"{self._place}: {file}")
            pixels.append(part_pixels)
            labels += part_labels
        self._pixels = np.concatenate(pixels)
        self.classes: list[str] | None = None
        self.labels: list[int] | None = None
        if labelled:
            self.classes, self.labels = _class_names(files[version.meta], version, self._place), labels
            if labels and not 0 <= min(labels) <= max(labels) < len(self.classes):
                raise ValueError(
                    f"{self._place}: labels must be 0 to {len(self.classes) - 1}, found {min(labels)} to {max(labels)}"
                )
        self.names = [f"{split}/{index:05d}" for index in range(len(self._pixels))]
        self.strays: list[Quarantined] = []
        sources = [self._place / file for file in version.parts[split]] if self._place.is_dir() else [self._place]
        self._facts = [fact for source in sources for fact in (source.name, *file_facts(source))]

    def read(self, index: int) -> bytes:
        """A PNG of 32×32 pixels."""
        return png(np.ascontiguousarray(self._pixels[index].transpose(1, 2, 0)))

    def identity(self) -> str:
        """The rows, and length and time of the files."""
        return fingerprint((*rows_facts(self.names, self.labels, self.classes), *self._facts))

    def close(self) -> None:
        """Holds nothing open."""


def _find(path: Path) -> tuple[Path, _Version]:
    """The unpacked folder or the archive, and what it is. Of the same version the folder is taken."""
    if path.is_file():
        places = [(path, version) for version in _VERSIONS if path.name == version.archive]
    else:
        places = [(path, v) for v in _VERSIONS if (path / v.meta).is_file() and (path / v.parts["test"][0]).is_file()]
        for version in () if places else _VERSIONS:
            if (path / version.folder).is_dir():
                places.append((path / version.folder, version))
            elif (path / version.archive).is_file():
                places.append((path / version.archive, version))
    if len(places) == 1:
        return places[0]
    if places:
        raise ValueError(f"{path} holds several data sets; name one: {', '.join(str(place) for place, _ in places)}")
    known = ", ".join(name for version in _VERSIONS for name in (version.folder, version.archive))
    raise ValueError(f"{path} must be, or be a folder with, one of {known}; found none")


def _read(place: Path, version: _Version, parts: tuple[str, ...]) -> dict[str, bytes]:
    wanted = (*parts, version.meta)
    found: dict[str, bytes] = {}
    if place.is_dir():
        for name in wanted:
            file = place / name
            if file.is_file():
                if file.stat().st_size > MAX_PART_BYTES:
                    raise ValueError(f"{file} must have at most {MAX_PART_BYTES} bytes, found {file.stat().st_size}")
                found[name] = file.read_bytes()
    else:
        with archive_members(place, dict.fromkeys(wanted, MAX_PART_BYTES)) as members:
            found = {name: stream.read() for name, stream in members}
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{place} is not whole: it must have {', '.join(missing)}; download it again")
    return found


def _binary_part(data: bytes, version: _Version, what: str) -> tuple[NDArray[np.uint8], list[int]]:
    length = version.num_label_bytes + NUM_PIXEL_BYTES
    if not data or len(data) % length:
        raise ValueError(f"{what} must have a multiple of {length} bytes, found {len(data)}; download it again")
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    labels = records[:, version.num_label_bytes - 1].tolist()
    return records[:, version.num_label_bytes :].reshape(-1, *SHAPE), labels


def _unpickled_part(data: bytes, version: _Version, what: str) -> tuple[NDArray[np.uint8], list[int]]:
    content = _unpickle(data, what)
    array, labels = content.get("data"), content.get(version.label_key)
    pixels = array.pixels() if isinstance(array, _PlainArray) else None
    if pixels is None or not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{what} must hold 'data', uint8 [n, {NUM_PIXEL_BYTES}], and {version.label_key!r}, integers")
    if len(labels) != len(pixels):
        raise ValueError(f"{what} holds {len(pixels)} images but {len(labels)} labels; download it again")
    return pixels, labels


def _class_names(data: bytes, version: _Version, place: Path) -> list[str]:
    names: Any = None
    if version.names_key:
        names = _unpickle(data, f"{place}: {version.meta}").get(version.names_key)
        if isinstance(names, list):
            names = [name.decode("latin1") if isinstance(name, bytes) else name for name in names]
    else:
        names = [line.strip() for line in data.decode("latin1").splitlines() if line.strip()]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: {version.meta} must hold the classes' names, found none")
    return names


def _unpickle(data: bytes, what: str) -> dict[str, Any]:
    try:
        # Python 2 wrote them; its texts are bytes.
        content = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # whatever a malformed pickle raises
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} is no file of CIFAR, or damaged: {message}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a dict, found a {type(content).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


class _PlainArray:
    """Stands in for a numpy array: keeps what the pickle says of it, and has numpy look at it only when it fits."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def pixels(self) -> NDArray[np.uint8] | None:
        """Images of uint8 [n, 3, 32, 32]; None if it is anything else."""
        match self.state:
            case (_, (int() as n, int() as width), _PlainType(is_bytes=True), by_column, bytes() as data):
                if n > 0 and width == NUM_PIXEL_BYTES and len(data) == n * width:
                    order = np.frombuffer(data, np.uint8)
                    rows = order.reshape(width, n).T if by_column else order.reshape(n, width)
                    return rows.reshape(-1, *SHAPE)
        return None


class _PlainType:
    """Stands in for a numpy type."""

    is_bytes = False

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which bytes have none of."""


def _reconstruct(*_: object) -> _PlainArray:
    return _PlainArray()


def _type(code: object = None, *_: object) -> _PlainType:
    plain = _PlainType()
    plain.is_bytes = code in (b"u1", "u1", b"|u1", "|u1")
    return plain


def _encode(text: str, encoding: object) -> bytes:
    """`_codecs.encode`, as Python 3 writes bytes in the old protocols."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"asks for the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _PlainArray,
    ("numpy", "dtype"): _type,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    """Knows the names in `_ALLOWED` alone, and gives harmless stand-ins for them."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs") from None
