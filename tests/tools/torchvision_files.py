"""Small CIFAR and STL sets in the forms in which the real ones are published."""

import io
import tarfile

import numpy as np

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [f"fine{i:02d}" for i in range(100)]


def images(num, seed, side=32):
    return np.random.default_rng(seed).integers(0, 256, (num, 3 * side * side), dtype=np.uint8)


def python2_pickle(content):
    """As Python 2 and its numpy wrote CIFAR: texts are bytes, arrays are `numpy.core.multiarray._reconstruct`."""

    def dump(value):
        match value:
            case dict():
                text = b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
            case list():
                text = b"](" + b"".join(map(dump, value)) + b"e"
            case tuple():
                text = b"(" + b"".join(map(dump, value)) + b"t"
            case str():
                text = b"U" + bytes([len(value)]) + value.encode()
            case bytes():
                text = b"T" + len(value).to_bytes(4, "little") + value
            case None:
                text = b"N"
            case bool():
                text = b"\x88" if value else b"\x89"
            case np.ndarray():
                kind = (
                    b"cnumpy\ndtype\n" + dump(("u1", 0, 1)) + b"R" + dump((3, "|", None, None, None, -1, -1, 0)) + b"b"
                )
                state = b"(" + dump(1) + dump(value.shape) + kind + dump(False) + dump(value.tobytes()) + b"t"
                start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + dump((0,)) + dump("b") + b"tR"
                text = start + state + b"b"
            case _:
                text = b"J" + int(value).to_bytes(4, "little", signed=True)
        return text

    return b"\x80\2" + dump(content) + b"."


def cifar_files(name):
    """{file: bytes} of a small CIFAR in one of its four forms; the same images in both forms of one set."""
    hundred = "100" in name
    names = CIFAR100_NAMES if hundred else CIFAR10_NAMES
    parts = {"train": 0, "test": 9} if hundred else {**{f"data_batch_{i}": i for i in range(1, 6)}, "test_batch": 9}
    files = {}
    for part, seed in parts.items():
        data = images(4, seed)
        labels = [(7 * seed + 3 * i) % len(names) for i in range(4)]
        if name.endswith(("-bin", "-binary")):
            before = np.array([[1, label] for label in labels] if hundred else [[label] for label in labels], np.uint8)
            files[f"{part}.bin"] = np.hstack([before, data]).tobytes()
        else:
            files[part] = python2_pickle({"data": data, "fine_labels" if hundred else "labels": labels})
    if name.endswith(("-bin", "-binary")):
        files["fine_label_names.txt" if hundred else "batches.meta.txt"] = ("\n".join(names) + "\n\n").encode()
    else:
        key = "fine_label_names" if hundred else "label_names"
        files["meta" if hundred else "batches.meta"] = python2_pickle({key: names})
    return files


def write(folder, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_archive(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def stl_files():
    files = {"class_names.txt": ("\n".join(CIFAR10_NAMES) + "\n").encode(), "fold_indices.txt": b""}
    for seed, (part, num) in enumerate({"train": 3, "test": 2, "unlabeled": 4}.items()):
        files[f"{part}_X.bin"] = images(num, seed, side=96).tobytes()
        if part != "unlabeled":
            files[f"{part}_y.bin"] = bytes([1 + (4 * i + seed) % 10 for i in range(num)])
    return files
