import json
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest

from tests.tools.source_files import CLASSES, photos, pixels, refusal, rows
from tools.image_decoding import UnusableImage
from tools.image_source import SourceOptions, open_source

OPTIONS = SourceOptions()


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def table_of(samples):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})
    content = {"picture": [{"bytes": d, "path": None} for d, _ in samples], "kind": [c for _, c in samples]}
    return datasets.Dataset.from_dict(content, features=features)


def test_rows_are_those_of_the_package(tmp_path):
    table_of(photos()).save_to_disk(tmp_path / "set", num_shards=2)
    source = open_source(tmp_path / "set", OPTIONS)
    theirs = datasets.load_from_disk(str(tmp_path / "set"))
    assert source.classes == theirs.features["kind"].names == CLASSES
    assert rows(source) == photos()
    for (data, label), row in zip(rows(source), theirs, strict=True):
        assert label == row["kind"]
        assert (pixels(data) == np.asarray(row["picture"])).all()
    assert source.names[0] == "row/0000000"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, list(range(7)) * 8)) == [data for data, _ in photos()] * 8
    source.close()


def test_rows_after_shuffling_and_selecting(tmp_path):
    table_of(photos()).shuffle(seed=3).select([4, 0, 2]).save_to_disk(tmp_path / "set")
    theirs = datasets.load_from_disk(str(tmp_path / "set")).cast_column("picture", datasets.Image(decode=False))
    expected = [(row["picture"]["bytes"], row["kind"]) for row in theirs]
    assert rows(open_source(tmp_path / "set", OPTIONS)) == expected
    assert expected != photos()[:3]


def test_splits_of_a_dict(tmp_path):
    parts = {"train": table_of(photos()[:5]), "test": table_of(photos()[5:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert rows(open_source(tmp_path / "set", SourceOptions(split="test"))) == photos()[5:]
    source = open_source(tmp_path / "set", SourceOptions(split="train", unlabelled=True))
    assert rows(source) == [(data, None) for data, _ in photos()[:5]]
    assert source.names[0] == "train/0000000"
    assert "has the splits train, test; choose one with --split" in refusal(tmp_path / "set")
    assert "which must not be 'val'" in refusal(tmp_path / "set", SourceOptions(split="val"))
    datasets.DatasetDict({"train": parts["train"]}).save_to_disk(tmp_path / "one")
    assert rows(open_source(tmp_path / "one", OPTIONS)) == photos()[:5]


def test_images_by_path_bytes_and_neither(tmp_path):
    photo = photos(1)[0][0]
    (tmp_path / "a.jpg").write_bytes(photo)
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kind = datasets.Features({"image": cell, "raw": datasets.Value("binary")})
    cells = [{"bytes": None, "path": str(tmp_path / "a.jpg")}, {"bytes": None, "path": None}, None]
    table = datasets.Dataset.from_dict({"image": cells, "raw": [photo, None, b"x"]}, features=kind)
    # `save_to_disk` takes the files of an Image in; so it is made one afterwards.
    table.save_to_disk(tmp_path / "set")
    note = tmp_path / "set" / "dataset_info.json"
    content = json.loads(note.read_text())
    content["features"]["image"] = {"_type": "Image"}
    note.write_text(json.dumps(content))
    source = open_source(tmp_path / "set", OPTIONS)
    assert source.read(0) == photo
    for row in (1, 2):
        with pytest.raises(UnusableImage, match="has no bytes in its row"):
            source.read(row)
    raw = open_source(tmp_path / "set", SourceOptions(image_column="raw"))
    assert raw.read(0) == photo
    with pytest.raises(UnusableImage, match="has no bytes"):
        raw.read(1)


def test_rows_without_a_label(tmp_path):
    samples = [(data, -1 if i == 2 else label) for i, (data, label) in enumerate(photos())]
    table_of(samples).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set", OPTIONS)
    assert rows(source) == [sample for sample in samples if sample[1] >= 0]
    assert [stray.file for stray in source.strays] == ["row/0000002"]
    table_of([(data, -1) for data, _ in samples]).save_to_disk(tmp_path / "test")
    assert open_source(tmp_path / "test", OPTIONS).labels is None


def test_what_is_no_saved_data_set_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "set"
    table_of(photos(2)).save_to_disk(folder)
    chosen = SourceOptions(format="huggingface")
    assert "must be a folder that save_to_disk wrote" in refusal(tmp_path, chosen)
    assert "leave out --split train" in refusal(folder, SourceOptions(split="train"))
    assert "'nothing' (--image-column), found 'picture', 'kind'" in refusal(
        folder, SourceOptions(image_column="nothing")
    )
    assert "must be an Image or binary" in refusal(folder, SourceOptions(image_column="kind"))
    (arrow,) = folder.glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:100])
    refusal(folder)
    arrow.unlink()
    refusal(folder)
    arrow.write_bytes(whole)
    state = folder / "state.json"
    text = state.read_text()
    state.write_text("{")
    refusal(folder)
    state.write_text(json.dumps(json.loads(text) | {"_data_files": [{"filename": "../../../etc/passwd"}]}))
    refusal(folder)
