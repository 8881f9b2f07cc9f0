"""Runs stock FFCV on the `.beton` files of a folder, in a process of its own: it is slow to import and
leaves threads.

python -m tests.tools.stock_ffcv FOLDER reads every `same_*.beton` (images of one size) and `varied_*.beton`
(of many) with FFCV's Reader and Loader, writes `stock_jpg.beton` and `stock_raw.beton` with FFCV's
DatasetWriter, and leaves what it found in `found.npz`.
"""

import sys
from pathlib import Path

import numpy as np
from ffcv import types
from ffcv.fields import (
    BytesField,
    FloatField,
    IntField,
    JSONField,
    NDArrayField,
    RGBImageField,
)
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import (
    CenterCropRGBImageDecoder,
    RandomResizedCropRGBImageDecoder,
    SimpleRGBImageDecoder,
    resizer,
)
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

from pipelines import beton_layout
from tests.tools.ugly_images import picture


class Pictures:
    """Images of many sizes with a field of every kind; what FFCV calls an indexed dataset."""

    sizes = ((30, 50), (64, 40), (700, 900), (1, 1), (333, 200))

    def __len__(self):
        return 2 * len(self.sizes)

    def __getitem__(self, i):
        i = int(i)
        text = np.frombuffer(b"caption" * (i % 3), np.uint8)
        return 0.5 * i, text, 10 - i, np.full(3, i, np.float32), picture(*self.sizes[i % 5]), {"i": i}


def check_layout():
    """FFCV's own types are the layout's."""
    assert types.CURRENT_VERSION == beton_layout.FORMAT_VERSION
    assert types.HeaderType == beton_layout.HEADER_DTYPE
    assert types.FieldDescType == beton_layout.FIELD_DTYPE
    assert types.ALLOC_TABLE_TYPE == beton_layout.ALLOCATION_DTYPE
    for type_id, handler in types.TYPE_ID_HANDLER.items():
        if handler is not None:
            field = handler.__new__(handler)
            assert field.metadata_type == beton_layout.FIELD_METADATA[type_id], handler
    fields = [BytesField(), RGBImageField(), IntField(), FloatField()]
    assert types.get_metadata_type(fields) == beton_layout.metadata_dtype([3, 2, 1, 0])


def load(path, decoder, os_cache=True):
    """All images and labels of a file through FFCV's Loader; without `os_cache` it reads whole pages."""
    loader = Loader(
        str(path),
        batch_size=4,
        num_workers=2,
        os_cache=os_cache,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={"image": [decoder], "label": [IntDecoder()]},
    )
    batches = [[column.copy() for column in batch] for batch in loader]
    return np.concatenate([batch[0] for batch in batches]), np.concatenate([batch[1] for batch in batches])[:, 0]


def write(path, mode):
    fields = {
        "weight": FloatField(),
        "caption": BytesField(),
        "class": IntField(),
        "vector": NDArrayField(np.dtype("<f4"), (3,)),
        "photo": RGBImageField(write_mode=mode, max_resolution=500),
        "extra": JSONField(),
    }
    DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=2).from_indexed_dataset(Pictures(), chunksize=2)


def main(folder):
    check_layout()
    found = {}
    for path in sorted(folder.glob("*.beton")):
        reader = Reader(str(path))
        found[f"{path.stem}.metadata"] = reader.metadata
        found[f"{path.stem}.page_size"] = reader.page_size
        found[f"{path.stem}.fields"] = reader.field_names
    for path in sorted(folder.glob("same_*.beton")):
        found[f"{path.stem}.images"], found[f"{path.stem}.labels"] = load(path, SimpleRGBImageDecoder())
    for path in sorted(folder.glob("varied_*.beton")):
        center = CenterCropRGBImageDecoder((32, 32), 1)
        found[f"{path.stem}.center"], found[f"{path.stem}.labels"] = load(path, center)
        found[f"{path.stem}.random"], _ = load(path, RandomResizedCropRGBImageDecoder((32, 32)))
    found["pages.images"], found["pages.labels"] = load(
        folder / "same_jpeg.beton", SimpleRGBImageDecoder(), os_cache=False
    )
    for size in ((499, 501), (501, 334), (900, 1200), (1600, 1000)):
        found[f"resized.{size[0]}"] = resizer(picture(*size), 500)
    for mode in ("jpg", "raw"):
        write(folder / f"stock_{mode}.beton", mode)
    np.savez(folder / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
