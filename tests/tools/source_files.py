"""What the tests of the sources share: small pictures, their labels, and the checks that hold for every source."""

import io
import tarfile

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from tests.tools.ugly_images import jpeg, picture, saved
from tools.image_source import SourceOptions, open_source

CLASSES = ["ant", "bee", "cow"]


def photos(num=7):
    """(bytes of a JPEG, number of its class) of `num` different pictures."""
    return [(jpeg(picture(16 + i, 24)), (2, 0, 1)[i % 3]) for i in range(num)]


def heic(image, *more, **options):
    """The bytes of a HEIC file of Pillow images or arrays."""
    pillow_heif.register_heif_opener()  # saving is for tests alone
    if more:
        options |= {"save_all": True, "append_images": list(more)}
    return saved(image, "HEIF", **{"quality": 95, "chroma": 444, **options})


def write_tar(path, members, *, format=tarfile.PAX_FORMAT):
    """A tar of {name: bytes}; a `TarInfo` in place of bytes is written as it is."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pixels(data):
    """What Pillow makes of the bytes of an image file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rows(source):
    """[(bytes, label)] of a source, after what must hold for every one."""
    assert len(set(source.names)) == len(source.names)
    assert not [name for name in source.names if name.startswith("/") or {"", ".", ".."} & set(name.split("/"))]
    assert (source.labels is None) == (source.classes is None)
    labels = source.labels if source.labels is not None else [None] * len(source.names)
    assert len(labels) == len(source.names)
    assert all(label is None or 0 <= label < len(source.classes) for label in labels)
    assert source.identity() == source.identity()
    return [(source.read(index), label) for index, label in enumerate(labels)]


def refusal(path, options=None):
    """The one line with which a source is refused."""
    with pytest.raises(ValueError) as error:
        open_source(path, options or SourceOptions())
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text
