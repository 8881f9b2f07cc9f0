"""Features on disk: what comes back is what went in, or a line that names the file."""

import fcntl
import resource
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from train.evaluation.feature_cache import FeatureWriter, cache_path, read_features

KEY = {"network": "abc", "head_layers": 0, "data": {"num_samples": 41}}
LABELS = np.arange(41) % 3


def values(seed=0):
    return torch.randn(41, 7, generator=torch.Generator().manual_seed(seed))


def write(folder, key=KEY, rows=10):
    """Features in pieces; returns the file."""
    path = cache_path(folder, key)
    with FeatureWriter(path, key, LABELS) as writer:
        for piece in torch.split(values(), rows):
            writer.append(piece)
        found, labels = writer.finish()
    assert torch.equal(found, values())
    assert labels.tolist() == LABELS.tolist()
    return path


def test_what_is_written_in_pieces_is_read_whole(tmp_path):
    path = write(tmp_path / "features")
    found, labels = read_features(path, KEY)
    assert torch.equal(found, values())
    assert (found.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == LABELS.tolist()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:  # the library's own reader
        assert torch.equal(file.get_tensor("features"), values())
        assert file.get_tensor("labels").tolist() == LABELS.tolist()
    found.zero_()  # a map of one's own
    assert torch.equal(read_features(path, KEY)[0], values())
    assert read_features(cache_path(tmp_path, KEY | {"network": "xyz"}), KEY) is None


def test_a_file_does_not_depend_on_its_pieces(tmp_path):
    assert write(tmp_path / "a", rows=10).read_bytes() == write(tmp_path / "b", rows=41).read_bytes()


def cut(content):
    return content[:-1]


def cut_in_the_header(content):
    return content[:40]


def flip_a_feature(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def flip_a_label(content):
    end = len(content) - 41 * 7 * 4
    return content[: end - 1] + bytes([content[end - 1] ^ 1]) + content[end:]


def older(content):
    return content.replace(b'"version": "1"', b'"version": "0"')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "is torn or damaged (its tensors take"),
        (cut_in_the_header, "is torn or damaged"),
        (flip_a_feature, "is torn or damaged (its features do not match their checksum)"),
        (flip_a_label, "is torn or damaged (its labels do not match their checksum)"),
        (older, "is of format 0, today's is 1"),
        (lambda content: b"", "is torn or damaged"),
    ],
)
def test_a_torn_file_is_named_and_made_anew(tmp_path, caplog, spoil, message):
    path = write(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    assert read_features(path, KEY) is None
    (line,) = caplog.messages
    assert line.startswith(str(path))
    assert message in line
    assert line.endswith("its features are made anew")
    write(tmp_path)
    assert torch.equal(read_features(path, KEY)[0], values())


def test_features_of_something_else_are_refused(tmp_path):
    other = KEY | {"network": "xyz"}
    path = cache_path(tmp_path, KEY)
    write(tmp_path, other).rename(path)
    with pytest.raises(
        ValueError, match=rf"{path.name} must hold features of `network` abc, got those of xyz: .*remov"
    ):
        read_features(path, KEY)
    save_file({"features": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="must hold cached features, got a safetensors file of something else; remove"):
        read_features(path, KEY)


def test_a_header_that_lies_about_its_size_is_torn(tmp_path, caplog):
    path = cache_path(tmp_path, KEY)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert read_features(path, KEY) is None
    assert "cannot hold a header" in caplog.text


def test_nothing_is_left_of_features_that_were_not_finished(tmp_path):
    path = cache_path(tmp_path, KEY)
    with pytest.raises(KeyboardInterrupt), FeatureWriter(path, KEY, LABELS) as writer:  # noqa: PT012
        writer.append(values()[:10])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_remains_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path):
    path = cache_path(tmp_path, KEY)
    dead, living = (tmp_path / f".{path.name}.{name}.partial" for name in ("dead", "living"))
    dead.write_bytes(b"some")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([living, path])


def test_what_another_process_takes_for_remains_before_it_is_locked_is_begun_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.extend(tmp_path.glob(".*.partial"))
            removed[0].unlink()  # as one does that begins at this very moment
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    path = write(tmp_path)
    assert removed
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_takes_no_more_is_named_with_the_remedy(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = cache_path(tmp_path, KEY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written \(File too large\); .*`--cache false`"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []
