import dataclasses
import json

import pytest

from pipelines.manifest import Manifest, ManifestError, Quarantined, file_sha256, load_manifest, manifest_path


@pytest.fixture
def beton(tmp_path):
    path = tmp_path / "set.beton"
    path.write_bytes(b"0123456789")
    return path


def example(**changes):
    manifest = Manifest(
        sha256="84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
        num_bytes=10,
        num_samples=3,
        classes=["cat", "dog"],
        class_counts=[2, 1],
        options={"encode": "jpeg", "max_side": 500},
        num_converted=0,
        quarantined=[Quarantined(file="cat/x.jpg", reason="is empty: 0 bytes")],
        tools={"pillow": "13.0.0"},
        files=["cat/1.jpg", "cat/Zoë\udcff.jpg", "dog/1.jpg"],
        crc32=[1, 2, 0xFFFFFFFF],
    )
    return dataclasses.replace(manifest, **changes)


def refusal(beton):
    with pytest.raises(ManifestError) as caught:
        load_manifest(beton)
    message = str(caught.value)
    assert message.startswith(f"{beton}.json: ")
    assert "\n" not in message
    assert "convert the images anew" in message
    return message


def test_it_lies_beside_the_beton_under_its_name():
    assert str(manifest_path("a/b.c/train.beton")) == "a/b.c/train.beton.json"


def test_it_comes_back_as_it_was_written(beton):
    manifest_path(beton).write_text(example().to_json())
    assert load_manifest(str(beton)) == example()
    unlabelled = example(classes=None, class_counts=None)
    manifest_path(beton).write_text(unlabelled.to_json())
    assert load_manifest(beton) == unlabelled


def test_a_beton_may_have_none(beton):
    assert load_manifest(beton) is None


def test_the_digest_is_that_of_sha256sum(beton):
    with beton.open("rb") as file:
        file.seek(7)
        assert file_sha256(file) == example().sha256


def test_that_of_another_beton_is_refused(beton):
    manifest_path(beton).write_text(example(num_bytes=11).to_json())
    assert "describes a .beton of 11 bytes, the one beside it has 10" in refusal(beton)


def test_torn_and_foreign_files_are_refused(beton):
    text = example().to_json()
    for content, expected in [
        ("", "torn or foreign"),
        (text[: len(text) // 2], "torn or foreign"),
        (b"\xff\xfe\0\x01", "torn or foreign"),
        ("[]", "expected a manifest of format 'twinview-manifest', found another file"),
        ('{"format": "coco"}', "found another file"),
        (text.replace('"format_version": 1', '"format_version": 2'), "manifest version 1, found 2"),
    ]:
        manifest_path(beton).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert expected in refusal(beton)


def test_one_at_odds_with_itself_is_refused(beton):
    good = json.loads(example().to_json())
    for changes, expected in [
        ({"crc32": [1, 2]}, "its counts disagree: [2, 3] samples"),
        ({"files": []}, "its counts disagree: [0, 3] samples"),
        ({"num_samples": 4}, "its counts disagree: [3, 4] samples"),
        ({"class_counts": [2, 2]}, "its counts disagree: [3, 4] samples"),
        ({"crc32": None}, "wrong types"),
        ({"quarantined": [3]}, "wrong types"),
        ({"colour": "red"}, "'colour'"),
    ]:
        manifest_path(beton).write_text(json.dumps({**good, **changes}))
        assert expected in refusal(beton)
