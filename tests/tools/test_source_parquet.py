import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.tools.source_files import CLASSES, photos, refusal, rows
from tools import source_parquet_cells
from tools.image_decoding import UnusableImage
from tools.image_source import SourceOptions, open_source

OPTIONS = SourceOptions()


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def columns_of(samples):
    return {"id": list(range(len(samples))), "jpg": [data for data, _ in samples], "label": [c for _, c in samples]}


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_rows_are_those_of_pyarrow(tmp_path, row_group_size):
    samples = photos()
    write(tmp_path / "b.parquet", columns_of(samples[:4]), row_group_size=row_group_size)
    write(tmp_path / "a" / "z.parquet", columns_of(samples[4:]), row_group_size=row_group_size)
    source = open_source(tmp_path, SourceOptions(format="parquet"))
    table = pyarrow.parquet.read_table(tmp_path / "a" / "z.parquet").to_pylist()
    table += pyarrow.parquet.read_table(tmp_path / "b.parquet").to_pylist()
    assert rows(source) == [(row["jpg"], row["label"]) for row in table] == samples[4:] + samples[:4]
    assert source.names[:4] == ["a/z/0000000", "a/z/0000001", "a/z/0000002", "b/0000000"]
    assert source.classes == ["0", "1", "2"]
    assert open_source(tmp_path / "b.parquet", OPTIONS).names[0] == "b/0000000"
    source.close()


def test_files_of_the_hub(tmp_path):
    """As `datasets` itself writes them: {bytes, path}, classes in the note, a split a file."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})
    samples = photos()
    content = {"image": [{"bytes": d, "path": "x.jpg"} for d, _ in samples], "kind": [c for _, c in samples]}
    table = datasets.Dataset.from_dict(content, features=features)
    (tmp_path / "data").mkdir()
    table.select(range(5)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    table.select([5, 6]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").touch()
    source = open_source(tmp_path, SourceOptions(split="train"))
    assert rows(source) == samples[:5]
    assert source.classes == CLASSES
    assert rows(open_source(tmp_path, SourceOptions(split="test", unlabelled=True))) == [
        (d, None) for d, _ in samples[5:]
    ]
    assert "holds several splits; choose one with --split: test, train" in refusal(tmp_path)
    assert "must hold the split 'val'" in refusal(tmp_path, SourceOptions(split="val"))


def test_labels_of_every_type(tmp_path):
    data = photos(1)[0][0]

    def read(cells, **options):
        source = open_source(write(tmp_path / "x.parquet", {"img": [data] * len(cells), "target": cells}), OPTIONS)
        return source.labels, source.classes, [stray.file for stray in source.strays]

    assert read(["b", "a", "b"]) == ([1, 0, 1], ["a", "b"], [])
    assert read(pyarrow.array(["b", "a"]).dictionary_encode()) == ([1, 0], ["a", "b"], [])
    assert read([3.0, None, 0.0]) == ([3, 0], ["0", "1", "2", "3"], ["x/0000001"])
    assert read([-1, -1]) == (None, None, [])
    assert read([True, False]) == ([1, 0], ["0", "1"], [])
    assert read([10**12, 5]) == ([1, 0], ["5", str(10**12)], [])
    assert "x.parquet, row 0: its label must be a whole number or a word, found [1]" in refusal(
        write(tmp_path / "x.parquet", {"img": [data], "label": [[1]]})
    )


def test_rows_in_any_order_and_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(source_parquet_cells, "BATCH_BYTES", 2000)
    monkeypatch.setattr(source_parquet_cells, "CACHE_BYTES", 6000)  # so that batches are dropped and read again
    cells = [np.random.default_rng(i).bytes(500) for i in range(60)]
    write(tmp_path / "a.parquet", {"image": cells[:40]}, row_group_size=16)
    write(tmp_path / "b.parquet", {"image": cells[40:]}, row_group_size=7)
    source = open_source(tmp_path, OPTIONS)
    order = np.random.default_rng(0).permutation(60)
    assert [source.read(i) for i in order] == [cells[i] for i in order]
    assert source._cells._num_kept_bytes <= 6000
    barrier = threading.Barrier(4)

    def read(seed):
        barrier.wait()
        order = np.random.default_rng(seed).permutation(60)
        return [source.read(i) for i in order] == [cells[i] for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_cells_without_bytes(tmp_path):
    data = photos(1)[0][0]
    source = open_source(write(tmp_path / "x.parquet", {"image": [None, data]}), OPTIONS)
    with pytest.raises(UnusableImage, match="has no bytes in its row"):
        source.read(0)
    assert source.read(1) == data


def test_a_torn_file_is_named(tmp_path):
    path = write(tmp_path / "x.parquet", columns_of(photos()), compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path} is no Parquet file, or not whole" in refusal(path)
    path.write_bytes(whole)
    source = open_source(path, OPTIONS)
    page = whole.index(photos()[0][0]) - 30
    path.write_bytes(whole[:page] + b"\xff" * 30 + whole[page + 30 :])  # its header; the footer stays
    with pytest.raises(OSError, match=r"x\.parquet is no Parquet file, or not whole"):
        source.read(0)


def test_columns_that_will_not_do_are_refused_in_one_line(tmp_path):
    data = [photos(1)[0][0]]
    one = write(tmp_path / "one.parquet", {"a": data, "word": ["x"]})
    two = write(tmp_path / "two.parquet", {"a": data, "b": data})
    none = write(tmp_path / "none.parquet", {"a": [1]})
    empty = write(tmp_path / "empty.parquet", {"a": pyarrow.array([], pyarrow.binary())})
    for path, options, expected in (
        (one, SourceOptions(image_column="x"), "must have the column 'x' (--image-column), found 'a', 'word'"),
        (one, SourceOptions(image_column="word"), "the column 'word' must hold bytes or {bytes, path}, found string"),
        (one, SourceOptions(label_column="x"), "must have the column 'x' (--label-column), found 'a', 'word'"),
        (one, SourceOptions(split="train"), "--split chooses among the files of a folder"),
        (two, OPTIONS, "has several columns with images (a, b); choose with --image-column"),
        (none, OPTIONS, "must have a column with the bytes of image files"),
        (empty, OPTIONS, "must hold rows, found none"),
    ):
        assert expected in refusal(path, options)
    folder = tmp_path / "both"
    write(folder / "a.parquet", {"a": data})
    write(folder / "b.parquet", {"b": data})
    assert "b.parquet must have the images' column 'a'" in refusal(folder)
