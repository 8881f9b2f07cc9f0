import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from tests.tools.source_files import pixels, refusal, rows
from tests.tools.torchvision_files import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    cifar_files,
    images,
    stl_files,
    write,
    write_archive,
)
from tools.image_source import SourceOptions, open_source
from tools.source_cifar import _PlainUnpickler

TRAIN, TEST = SourceOptions(split="train"), SourceOptions(split="test")


class Unchecked:
    """torchvision's classes compare checksums of the full sets."""

    def _check_integrity(self):
        return True

    def _load_meta(self):
        self.classes = None


def expected(kind, root, **options):
    """[(pixels, label)] of torchvision's own class."""
    theirs = type("Theirs", (Unchecked, kind), {})(str(root), **options)
    return [(np.asarray(image), label) for image, label in theirs]


def assert_equal(source, truth):
    ours = rows(source)
    assert len(ours) == len(truth) > 0
    for (data, label), (image, their_label) in zip(ours, truth, strict=True):
        assert data.startswith(b"\x89PNG")
        np.testing.assert_array_equal(pixels(data), image)
        assert label == their_label


@pytest.mark.parametrize(
    ("folder", "binary", "archive", "kind", "names"),
    [
        ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-{}.tar.gz", CIFAR10, CIFAR10_NAMES),
        ("cifar-100-python", "cifar-100-binary", "cifar-100-{}.tar.gz", CIFAR100, CIFAR100_NAMES),
    ],
)
def test_cifar_is_as_torchvision_reads_it(tmp_path, folder, binary, archive, kind, names):
    inner = write(tmp_path / "a" / folder, cifar_files(folder))
    other = write(tmp_path / "b" / binary, cifar_files(binary))
    (tmp_path / "c").mkdir()
    packed = write_archive(tmp_path / "c" / archive.format("python"), folder, cifar_files(folder))
    packed_binary = write_archive(tmp_path / archive.format("binary"), binary, cifar_files(binary))
    for options in (TRAIN, TEST):
        truth = expected(kind, tmp_path / "a", train=options.split == "train")
        for path in (inner, inner.parent, other, packed, packed.parent, packed_binary):
            source = open_source(path, options)
            assert_equal(source, truth)
            assert source.classes == names
    assert source.names[:2] == ["test/00000", "test/00001"]
    assert open_source(inner, SourceOptions(split="test", unlabelled=True)).labels is None
    assert "has the splits train, test; choose one with --split" in refusal(inner)
    assert open_source(inner, TRAIN).identity() != open_source(inner, TEST).identity()


def test_a_pickle_of_todays_python_is_read_as_well(tmp_path):
    files = cifar_files("cifar-10-batches-py")
    data = images(4, 9)
    for array in (data, np.asfortranarray(data)):
        files["test_batch"] = pickle.dumps({"data": array, "labels": [1, 2, 3, 4]}, protocol=2)
        folder = write(tmp_path / str(array.flags.c_contiguous) / "cifar-10-batches-py", files)
        found = np.stack([pixels(data) for data, _ in rows(open_source(folder, TEST))])
        np.testing.assert_array_equal(found, data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class Bomb:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_pickles_run_nothing(tmp_path):
    mark = tmp_path / "mark"
    folder = write(tmp_path / "cifar-10-batches-py", cifar_files("cifar-10-batches-py"))
    for bomb, asks in (
        (Bomb(os.mkdir, (str(mark),)), "posix.mkdir"),
        (Bomb(eval, (f"__import__('os').mkdir({str(mark)!r})",)), "builtins.eval"),
        (Bomb(np.load, (str(mark),)), "numpy"),
        (Bomb(getattr, (bytes, "fromhex")), "builtins.getattr"),
    ):
        for protocol in (0, 2, 4):
            (folder / "test_batch").write_bytes(pickle.dumps({"data": bomb, "labels": [1]}, protocol=protocol))
            line = refusal(folder, TEST)
            assert "test_batch is no file of CIFAR, or damaged: it asks for" in line
            assert asks in line or protocol < 4
    assert not mark.exists()
    with pytest.raises(pickle.UnpicklingError, match=r"asks for the encoding 'rot13'"):
        _PlainUnpickler(io.BytesIO(b"c_codecs\nencode\n(Va\nVrot13\ntR.")).load()


def test_damaged_cifar_is_refused_in_one_line(tmp_path):
    good = cifar_files("cifar-10-batches-py")
    data = images(4, 1)
    for number, (content, line) in enumerate(
        (
            (good["test_batch"][:-9], "test_batch is no file of CIFAR, or damaged"),
            (b"", "test_batch is no file of CIFAR, or damaged"),
            (b"\x80\2]\x94.", "must hold a dict, found a list"),
            (pickle.dumps({"data": data[:, 1:], "labels": [1] * 4}, protocol=2), "must hold 'data', uint8 [n, 3072]"),
            (pickle.dumps({"data": data.astype("i1"), "labels": [1] * 4}, protocol=2), "must hold 'data', uint8"),
            (pickle.dumps({"data": data, "labels": [1] * 3}, protocol=2), "holds 4 images but 3 labels"),
            (pickle.dumps({"data": data, "labels": [1, 2, 3, 10]}, protocol=2), "labels must be 0 to 9, found 1 to 10"),
            (pickle.dumps({"data": data, "labels": [1, 2, 3, "x"]}, protocol=2), "must hold 'data'"),
        )
    ):
        folder = write(tmp_path / str(number) / "cifar-10-batches-py", good | {"test_batch": content})
        assert line in refusal(folder, TEST)
    (folder / "data_batch_3").unlink()
    assert "is not whole: it must have data_batch_3; download it again" in refusal(folder, TRAIN)
    write(folder.parent / "cifar-100-python", cifar_files("cifar-100-python"))
    assert "holds several data sets; name one" in refusal(folder.parent, TRAIN)
    binary = cifar_files("cifar-10-batches-bin")
    torn = write(tmp_path / "cifar-10-batches-bin", binary | {"test_batch.bin": binary["test_batch.bin"][:-1]})
    assert "must have a multiple of 3073 bytes" in refusal(torn, TEST)
    packed = write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", good)
    whole = packed.read_bytes()
    for length in (0, 20, len(whole) // 2, len(whole) - 2000):
        packed.write_bytes(whole[:length])
        assert str(packed) in refusal(packed, TRAIN)


def test_stl_is_as_torchvision_reads_it(tmp_path):
    inner = write(tmp_path / "a" / "stl10_binary", stl_files())
    packed = write_archive(tmp_path / "stl10_binary.tar.gz", "stl10_binary", stl_files())
    for split in STL10.splits:
        truth = expected(STL10, tmp_path / "a", split=split)
        if "unlabeled" in split:  # torchvision says -1 and knows no set without labels
            truth = [(image, None) for image, _ in truth]
        for path in (inner, inner.parent, packed, packed.parent):
            source = open_source(path, SourceOptions(split=split))
            assert_equal(source, truth)
            assert source.classes == (None if "unlabeled" in split else CIFAR10_NAMES)
            with ThreadPoolExecutor(4) as pool:
                assert list(pool.map(source.read, range(len(truth)))) == [data for data, _ in rows(source)]
            source.close()
    assert source.names[0].startswith("test/")
    assert "choose one with --split" in refusal(inner)


def test_damaged_stl_is_refused_in_one_line(tmp_path):
    folder = write(tmp_path / "stl10_binary", stl_files())
    (folder / "train_y.bin").write_bytes(b"\1\2")
    assert "train_y.bin must hold 3 labels from 1 to 10, found 2 from 1 to 2" in refusal(folder, TRAIN)
    (folder / "train_y.bin").write_bytes(b"\0\2\3")
    assert "found 3 from 0 to 3" in refusal(folder, TRAIN)
    (folder / "train_X.bin").write_bytes(bytes(27649))
    assert "train_X.bin must have a multiple of 27648 bytes, found 27649" in refusal(folder, TRAIN)
    (folder / "test_y.bin").unlink()
    assert "it must have test_y.bin" in refusal(folder, TEST)
    packed = write_archive(tmp_path / "stl10_binary.tar.gz", "stl10_binary", stl_files())
    packed.write_bytes(packed.read_bytes()[:-40_000])
    assert str(packed) in refusal(packed, SourceOptions(split="unlabeled"))
