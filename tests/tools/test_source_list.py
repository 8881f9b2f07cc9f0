import csv
import json

import pytest

from tests.tools.source_files import photos, refusal, rows
from tools.image_decoding import UnusableImage
from tools.image_source import SourceOptions, open_source

OPTIONS = SourceOptions()


@pytest.fixture
def folder(tmp_path):
    """A folder `photos` with 0.jpg, … 6.jpg, of which Python's csv writes a list."""
    (tmp_path / "photos").mkdir()
    for i, (data, _) in enumerate(photos()):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(data)
    return tmp_path


def written(folder, text, name="list.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("delimiter", "name"), [(",", "l.csv"), (";", "l.csv"), ("\t", "l.tsv"), ("\t", "l.txt")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_every_dialect(folder, delimiter, name, encoding):
    (folder / 'a "b", c;d\t.jpg').write_bytes(b"odd name")
    listed = [["File_Name", "note", "Label"]]
    listed += [[f"photos/{i}.jpg", "some, text; ü", str(label)] for i, (_, label) in enumerate(photos())]
    listed += [['a "b", c;d\t.jpg', "two\nlines", "0"]]
    with (folder / name).open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(listed)
    source = open_source(folder / name, SourceOptions(format="list"))
    with (folder / name).open(encoding=encoding, newline="") as file:
        theirs = list(csv.DictReader(file, delimiter=delimiter))
    assert rows(source) == [((folder / row["File_Name"]).read_bytes(), int(row["Label"])) for row in theirs]
    assert source.names == [row["File_Name"] for row in theirs]
    assert source.classes == ["0", "1", "2"]
    assert not source.strays


def test_json_lines_and_a_json_list(folder):
    entries = [{"file_name": f"photos/{i}.jpg", "label": "abc"[label]} for i, (_, label) in enumerate(photos())]
    expected = photos()
    for name, text in (
        ("a.jsonl", "\n\n".join(map(json.dumps, entries))),
        ("b.jsonl", "\ufeff" + "\r\n".join(map(json.dumps, entries)) + "\r\n"),
        ("c.json", json.dumps(entries, indent=1)),
    ):
        source = open_source(written(folder, text, name), OPTIONS)
        assert rows(source) == expected
        assert source.classes == ["a", "b", "c"]


def test_columns_are_found_or_given(folder):
    path = written(folder, "id,where,kind,path\n7,photos/0.jpg,cat,photos/1.jpg\n8,photos/2.jpg,dog,photos/3.jpg\n")
    source = open_source(path, OPTIONS)
    assert (source.names, source.labels) == (["photos/1.jpg", "photos/3.jpg"], None)
    source = open_source(path, SourceOptions(image_column="where", label_column="kind"))
    assert (source.names, source.classes) == (["photos/0.jpg", "photos/2.jpg"], ["cat", "dog"])
    alone = open_source(written(folder, "whatever\nphotos/0.jpg\n"), OPTIONS)
    assert rows(alone) == [(photos()[0][0], None)]
    assert open_source(written(folder, "image,label\nphotos/0.jpg,3\n"), SourceOptions(unlabelled=True)).labels is None


def test_absolute_and_foreign_paths(folder, tmp_path):
    text = f"path\n{folder}/photos/0.jpg\nphotos/../photos/1.jpg\nphotos\\2.jpg\n./photos/3.jpg\n"
    source = open_source(written(folder, text), OPTIONS)
    assert [data for data, _ in rows(source)] == [data for data, _ in photos()[:4]]
    assert source.names == [f"{folder}/photos/0.jpg"[1:], "photos/(..)/photos/1.jpg", "photos/2.jpg", "photos/3.jpg"]


def test_bad_lines_are_listed_with_their_reason(folder):
    text = (
        "path,label\r\nphotos/0.jpg,1\r\n\r\n , \r\nphotos/1.jpg\r\n,1\r\nphotos/0.jpg,0\r\nphotos/2.jpg,\r\n"
        "http://x.org/a.jpg,1\r\nphotos/none.jpg,0\r\n"
    )
    source = open_source(written(folder, text), OPTIONS)
    assert source.names == ["photos/0.jpg", "photos/none.jpg"]
    assert [(stray.file, stray.reason) for stray in source.strays] == [
        ("list.csv, line 5", "has 1 cells, not 2 as the header"),
        ("list.csv, line 6", "has no path (list.csv, line 6)"),
        ("photos/0.jpg", "is listed twice; the first is taken (list.csv, line 7)"),
        ("http:/x.org/a.jpg", "is an address on the network; download the images first (list.csv, line 9)"),
        ("photos/2.jpg", "has no label; --unlabelled takes all images, without labels"),
    ]
    with pytest.raises(UnusableImage, match=r"^no such file$"):
        source.read(1)


def test_lists_that_will_not_do_are_refused_in_one_line(folder):
    for text, expected in (
        ("", "must begin with a line of column names, such as path,label; found an empty file"),
        ("photos/0.jpg,1\nphotos/1.jpg,0\n", "found 'photos/0.jpg,1', a row; add that line"),
        ("path,label\n", "must list images, found none"),
        ("a,b\nphotos/0.jpg,1\n", "must have a column of paths, called path or file_name or named by --image-column"),
        ("path,path\nx,y\n", "must name each column once, found 'path' twice"),
        ('path,label\n"photos/0.jpg,1\n', "is no line of a CSV file"),
        ("path\n\n \n", "must list images, found none"),
    ):
        assert expected in refusal(written(folder, text))
    path = written(folder, "path,Größe\nphotos/0.jpg,1\n", encoding="latin1")
    assert "must be text in UTF-8, found other bytes in line 1; save it as UTF-8" in refusal(path)
    assert "must have the column 'x' (--label-column), found 'path', 'y'" in refusal(
        written(folder, "path,y\na,1\n"), SourceOptions(label_column="x")
    )
    for text, expected in (
        ('{"path": "a"}\n{"path": ', "bad.jsonl, line 2: is no JSON"),
        ("[" * 100_000, "bad.jsonl, line 1: is no JSON"),
        ('{"path": "a", "label": [1]}', "bad.jsonl, line 1: its label must be a whole number or a word, found [1]"),
        ("3\n4\n", "must have a column of paths"),
    ):
        assert expected in refusal(written(folder, text, "bad.jsonl"))
    assert "found none at" in refusal(folder / "no.csv", SourceOptions(format="list"))


def test_identity_tells_of_changes_and_not_of_places(folder, tmp_path_factory):
    text = "path,label\n" + "".join(f"photos/{i}.jpg,{i}\n" for i in range(7))
    before = open_source(written(folder, text), OPTIONS).identity()
    place = tmp_path_factory.mktemp("else") / "where"
    folder.rename(place)
    assert open_source(place / "list.csv", OPTIONS).identity() == before
    (place / "photos" / "3.jpg").write_bytes(b"other")
    changed = open_source(place / "list.csv", OPTIONS).identity()
    (place / "photos" / "3.jpg").unlink()
    assert len({before, changed, open_source(place / "list.csv", OPTIONS).identity()}) == 3
    written(place, text.replace("jpg,3", "jpg,2"))
    assert open_source(place / "list.csv", OPTIONS).identity() not in (before, changed)


def test_whole_numbers_with_a_decimal_point_as_pandas_writes_them_beside_an_empty_cell(folder):
    text = "path,label\n" + "".join(f"photos/{i}.jpg,{label}\n" for i, label in enumerate(["10.0", "2.0", "", "0.0"]))
    source = open_source(written(folder, text), OPTIONS)
    assert source.labels == [10, 2, 0]
    assert source.classes == [str(number) for number in range(11)]
    words = open_source(written(folder, "path,label\nphotos/0.jpg,1.0\nphotos/1.jpg,1.5\n", "words.csv"), OPTIONS)
    assert words.classes == ["1.0", "1.5"]
