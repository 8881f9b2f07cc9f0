import gzip
import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_iterator

from tests.tools.source_files import CLASSES, photos, refusal, rows, write_tar
from tools.image_source import SourceOptions, open_source
from tools.source_tar import MAX_HEADER_BYTES
from tools.source_webdataset import expand_braces

OPTIONS = SourceOptions()


def write_shards(folder, samples, maxcount=3):
    """Shards `shard-000.tar`, … of WebDataset's own writer."""
    with webdataset.ShardWriter(str(folder / "shard-%03d.tar"), maxcount=maxcount, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def in_package(paths):
    """The samples that the package itself reads, {extension: bytes}, in order."""
    samples = []
    for path in paths:
        with path.open("rb") as file:
            members = ({**member, "__url__": str(path)} for member in tar_file_iterator(file))
            samples += group_by_keys(members)
    return samples


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(
        folder,
        [
            {"__key__": f"x.y/{i:04d}", "jpg": data, "cls": label, "json": {"word": CLASSES[label]}}
            for i, (data, label) in enumerate(photos())
        ],
    )
    return folder


def test_rows_are_those_of_the_package(shards):
    source = open_source(shards, OPTIONS)
    theirs = in_package(sorted(shards.glob("*.tar")))
    assert len(theirs) == 7
    assert rows(source) == [(sample["jpg"], int(sample["cls"])) for sample in theirs]
    assert [name.split("/", 1)[1] for name in source.names] == [sample["__key__"] for sample in theirs]
    assert source.names[3] == "shard-001/x.y/0003"
    assert source.classes == ["0", "1", "2"]
    assert not source.strays


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_dialect(tmp_path, format):
    (data, _), (other, _) = photos(2)
    folder = "f" * 90 if format == tarfile.USTAR_FORMAT else "ü" * 120
    path = write_tar(
        tmp_path / "a.tar",
        {f"{folder}/{'k' * 80}.jpg": data, f"{folder}/{'k' * 80}.cls": b"4", "b.JPG": other, "b.cls": b"0"},
        format=format,
    )
    source = open_source(path, OPTIONS)
    assert source.names == [f"a/{folder}/{'k' * 80}", "a/b"]
    assert rows(source) == [(data, 4), (other, 0)]
    assert [sample["__key__"] for sample in in_package([path])] == [f"{folder}/{'k' * 80}", "b"]


def test_labels_are_numbers_words_or_a_field(shards, tmp_path):
    by_field = open_source(shards, SourceOptions(label_column="word"))
    assert by_field.classes == CLASSES
    assert by_field.labels == [label for _, label in photos()]
    assert open_source(shards, SourceOptions(unlabelled=True)).labels is None
    data = photos(1)[0][0]
    words = write_tar(
        tmp_path / "words.tar",
        {
            "1.jpg": data,
            "1.cls": b"dog\n",
            "2.jpg": data,
            "2.cls": b"cat",
            "3.jpg": data,
            "4.jpg": data,
            "4.cls": b"dog",
        },
    )
    source = open_source(words, OPTIONS)
    assert (source.classes, source.labels) == (["cat", "dog"], [1, 0, 1])
    assert [(stray.file, stray.reason.split(";")[0]) for stray in source.strays] == [("words/3", "has no label")]
    assert source.read(2) == data
    default = write_tar(tmp_path / "d.tar", {"1.jpg": data, "1.json": b'{"label": 3}'})
    assert open_source(default, OPTIONS).labels == [3]


def test_what_belongs_to_no_row_is_listed(tmp_path):
    data = photos(1)[0][0]
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = write_tar(
        tmp_path / "odd.tar",
        {
            "a.jpg": data,
            "a.txt": b"caption",
            "a.seg.png": data,
            "./b.jpg": data,
            "words.txt": b"no image",
            "README": b"",
            "two.jpg": data,
            "two.png": data,
            "link.jpg": link,
            "../../etc/evil.jpg": data,
            "/root/evil.jpg": data,
            "__index__/x.jpg": data,
            "._a.jpg": b"of a Mac",
        },
    )
    source = open_source(path, OPTIONS)
    assert source.names == ["odd/a", "odd/b", "odd/(..)/(..)/etc/evil", "odd/root/evil"]
    assert {stray.file: stray.reason for stray in source.strays} == {
        "odd/words": "has no image (only .txt)",
        "odd/README": "has no extension, so it belongs to no sample",
        "odd/two": "has several images (.jpg, .png); choose one with --image-column",
        "odd/link.jpg": "is a link",
    }
    chosen = open_source(path, SourceOptions(image_column="png"))
    assert chosen.names == ["odd/two"]


def test_many_threads_read_at_a_time(shards):
    source = open_source(shards, OPTIONS)
    barrier = threading.Barrier(4)

    def read(_):
        barrier.wait()
        return [source.read(index) for index in range(7)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [[data for data, _ in photos()]] * 4


def test_offsets_beyond_two_gigabytes(tmp_path):
    data = photos(1)[0][0]
    path = tmp_path / "big.tar"
    hole = tarfile.TarInfo("hole.bin")
    hole.size = 5 << 30
    with path.open("wb") as file:
        file.write(hole.tobuf(tarfile.GNU_FORMAT))
        file.seek(hole.size, io.SEEK_CUR)  # takes no room on the disk
        info = tarfile.TarInfo("1.jpg")
        info.size = len(data)
        file.write(info.tobuf() + data + bytes(-len(data) % 512 + 1024))
    source = open_source(path, OPTIONS)
    assert source.read(0) == data


def test_torn_shards_are_named(shards):
    torn = shards / "shard-001.tar"
    whole = torn.read_bytes()
    with tarfile.open(torn) as tar:
        member = tar.getmembers()[4]
    headers = member.offset
    for length in (member.offset_data + 10, headers + 100, headers, 700, 100, 0):
        torn.write_bytes(whole[:length])
        assert str(torn) in refusal(shards), length
    damaged = bytearray(whole)
    damaged[headers + 20] ^= 1
    torn.write_bytes(damaged)
    assert f"expected a member or the end mark at byte {headers}, found no header" in refusal(shards)


def test_sizes_that_cannot_be_are_refused(tmp_path):
    def header(size, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo("a.jpg")
        info.type = kind
        block = bytearray(info.tobuf())
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    path = tmp_path / "a.tar"
    huge = b"\x80" + (1 << 80).to_bytes(11, "big")
    negative = b"\xff" * 11 + b"\0"
    for block, expected in (
        (header(huge), "states"),
        (header(b"77777777777\0"), "states 8589934591 bytes at 512, the file has"),
        (header(negative), "a.tar"),
        (
            header(b"%011o\0" % (2 * MAX_HEADER_BYTES), tarfile.GNUTYPE_LONGNAME),
            f"a header states {2 * MAX_HEADER_BYTES}",
        ),
        (header(huge, tarfile.XHDTYPE), "a header states"),
        (header(negative, tarfile.XHDTYPE), "a.tar"),
    ):
        path.write_bytes(block + bytes(4 << 20))
        assert expected in refusal(path)


def test_what_cannot_be_shards_is_refused_in_one_line(tmp_path, shards):
    packed = tmp_path / "x" / "packed.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((shards / "shard-000.tar").read_bytes()))
    renamed = packed.with_name("renamed.tar")
    renamed.write_bytes(packed.read_bytes())
    words = write_tar(tmp_path / "x" / "words.tar", {"1.txt": b"a"})
    label = write_tar(tmp_path / "x" / "label.tar", {"1.jpg": b"a", "1.json": b"{"})
    listed = write_tar(tmp_path / "x" / "list.tar", {"1.jpg": b"a", "1.json": json.dumps({"label": [1]}).encode()})
    for path, options, expected in (
        (packed, OPTIONS, "is compressed, so its members cannot be read at random; unpack it"),
        (renamed, OPTIONS, "must be a tar file, whole and uncompressed"),
        (words, OPTIONS, "must hold samples with an image, found 1 without ('words/1' has no image (only .txt))"),
        (label, OPTIONS, "label/1: its .json is not whole"),
        (listed, OPTIONS, "list/1: its label must be a whole number or a word, found [1]"),
        (shards, SourceOptions(label_column="nothing"), "--label-column nothing: no sample's .json has this field"),
        (shards / "shard-{000..009}.tar", OPTIONS, "shard-003.tar must be a tar file, found nothing"),
    ):
        assert expected in refusal(path, options)


def test_brace_patterns(shards):
    source = open_source(shards / "shard-{001..002}.tar", OPTIONS)
    assert source.names == [f"shard-00{i // 3}/x.y/000{i}" for i in range(3, 7)]
    assert expand_braces("{a,b}{08..10}") == [f"{a}{i}" for a in "ab" for i in ("08", "09", "10")]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    for pattern in ("{1}", "{2..1}", "{0..9999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match=r"\{"):
            expand_braces(pattern)


def test_identity_tells_of_changes_and_not_of_places(shards, tmp_path):
    before = open_source(shards, OPTIONS).identity()
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in sorted(shards.glob("*.tar")):
        shard.rename(moved / shard.name)
    assert open_source(moved, OPTIONS).identity() == before
    assert open_source(moved, SourceOptions(unlabelled=True)).identity() != before
    shard = moved / "shard-002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    assert open_source(moved, OPTIONS).identity() != before


def test_a_whole_number_in_json_may_have_a_decimal_point(tmp_path):
    members = {}
    for i, (data, label) in enumerate(photos()):
        members |= {f"{i}.jpg": data, f"{i}.json": json.dumps({"label": float(label)}).encode()}
    source = open_source(write_tar(tmp_path / "a.tar", members), OPTIONS)
    assert source.labels == [label for _, label in photos()]
    assert source.classes == ["0", "1", "2"]
