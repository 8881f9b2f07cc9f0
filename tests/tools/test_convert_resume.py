"""A conversion that is stopped or killed anywhere, and started again, ends with the bytes of one that was not."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.tools.killed_conversions import serving
from tests.tools.test_convert_shards import PAGE, RAW, SHARD, make_source
from tests.tools.ugly_images import picture, saved
from tools import convert_output
from tools import convert_progress as progress_module
from tools.convert import convert, convert_images
from tools.convert_journal import open_journal
from tools.convert_places import Places
from tools.convert_progress import read_progress
from tools.image_encoding import EncodeOptions
from tools.whole_file import locked_file, whole_file

KILLED = -signal.SIGKILL
DESTS = {"one": ("x.beton", None), "shards": ("x.shards.json", SHARD)}
FEW = {"one": 13, "shards": 41}  # every so many steps one kill, where not all are tried


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What conversions that nothing disturbs leave behind, by kind."""
    found = {}
    for kind in DESTS:
        folder = tmp_path_factory.mktemp(kind)
        again(source, folder, kind)
        found[kind] = files(folder)
    return found


def again(source, folder, kind, options=RAW, **more):
    name, shard_size = DESTS[kind]
    places = Places(dest=folder / name, shard_size=shard_size, page_size=PAGE)
    return convert_images(source, places, options, workers=2, **more)


def killed(server, source, folder, kind, step):
    """Converts in a process that is killed at a step; returns its exit code."""
    name, shard_size = DESTS[kind]
    encode = {"encode": RAW.encode, "max_side": RAW.max_side}
    return server.convert(source, folder / name, kill_at=step, shard_size=shard_size, encode=encode)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sweep(server, source, folder, kind, expected, steps):
    for step in steps:
        place = folder / str(step)
        place.mkdir()
        code = killed(server, source, place, kind, step)
        if code == 0:
            assert step > 100, "no step was reached"
            break
        assert code == KILLED
        left = {path.name for path in place.iterdir()}
        dest = DESTS[kind][0]
        if dest not in left or f"{dest}.journal" in left:  # else it was killed after its last step
            again(source, place, kind)
        assert files(place) == expected, step
        shutil.rmtree(place)


class TestKilled:
    @pytest.mark.parametrize("kind", DESTS)
    def test_at_some_steps(self, server, source, tmp_path, whole, kind):
        sweep(server, source, tmp_path, kind, whole[kind], range(5, 1000, FEW[kind]))

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    @pytest.mark.parametrize("kind", DESTS)
    def test_at_every_step(self, server, source, tmp_path, whole, kind):
        sweep(server, source, tmp_path, kind, whole[kind], itertools.count(1))

    @pytest.mark.parametrize("kind", DESTS)
    def test_again_and_again(self, server, source, tmp_path, whole, kind):
        codes = []
        while not codes or codes[-1] != 0:
            codes.append(killed(server, source, tmp_path, kind, 70))
            assert len(codes) < 50
        assert set(codes[:-1]) == {KILLED}
        assert files(tmp_path) == whole[kind]

    def test_what_was_done_is_not_done_again(self, server, source, tmp_path, whole):
        """Images that were done are made useless behind its back: were they read again, the bytes would differ."""
        images = shutil.copytree(source, tmp_path / "images")
        folder = tmp_path / "set"
        folder.mkdir()
        assert killed(server, images, folder, "shards", 200) == KILLED
        with open_journal(folder / "x.shards.json.journal") as journal:
            progress = read_progress(journal)
        assert progress.next_index >= 4
        names = sorted(path for path in images.glob("*/*"))[: progress.next_index]
        for path in names:
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        told = again(images, folder, "shards")
        assert files(folder) == whole["shards"]
        assert told.num_new == 15 - progress.next_index - (3 - len(progress.quarantined))


@pytest.fixture
def stopped(source, tmp_path, monkeypatch):
    """A folder with a conversion to x.beton that a failing disk stopped after six images."""
    images = shutil.copytree(source, tmp_path / "images")
    folder = tmp_path / "set"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(convert_output, "JOURNAL_SECONDS", 0.0)
        add = convert_output.BetonWriter.add

        def failing(writer, *arguments):
            if writer.num_samples == 6:
                raise OSError(5, os.strerror(5))
            add(writer, *arguments)

        patch.setattr(convert_output.BetonWriter, "add", failing)
        with pytest.raises(OSError, match=r"x\.beton: Input/output error, after 7 of 15 files; what was done is kept"):
            again(images, folder, "one")
    assert sorted(files(folder)) == ["x.beton.journal", "x.beton.partial"]
    return images, folder


class TestRefused:
    def refusal(self, images, folder, **more):
        before = files(folder)
        with pytest.raises(ValueError) as caught:
            again(images, folder, "one", **more)
        assert files(folder) == before
        return str(caught.value)

    def test_it_goes_on_if_nothing_changed(self, stopped, whole, capfd):
        images, folder = stopped
        again(images, folder, "one")
        assert files(folder) == whole["one"]
        assert "of 15 files were done; the others need about" in capfd.readouterr().err

    def test_a_changed_image(self, stopped):
        images, folder = stopped
        os.utime(images / "b" / "10.png", ns=(1, 1))
        told = self.refusal(images, folder)
        assert "x.beton.journal: a conversion was begun here that cannot go on: the images have changed since" in told
        (images / "b" / "new.png").write_bytes(saved(picture(), "PNG"))
        assert "they were 15 and are 16; put that right, or pass --restart" in self.refusal(images, folder)

    def test_other_options_and_versions(self, stopped, monkeypatch):
        images, folder = stopped
        other = EncodeOptions(encode="raw", max_side=400)
        assert "`max_side` was 0 and is 400; put that right" in self.refusal(images, folder, options=other)
        monkeypatch.setattr(progress_module.np, "__version__", "9.9")
        assert f"`numpy` was {np.version.version} and is 9.9" in self.refusal(images, folder)

    def test_a_partial_file_that_is_gone_or_spoilt(self, stopped, whole):
        images, folder = stopped
        partial = folder / "x.beton.partial"
        data = partial.read_bytes()
        with open_journal(folder / "x.beton.journal") as journal:
            last = read_progress(journal).shard.rows[-1]
        begin, end = int(last["offset"]), int(last["offset"]) + int(last["size"])
        partial.write_bytes(data[: end - 1])
        assert f"x.beton.partial must have {end} bytes, found {end - 1}" in self.refusal(images, folder)
        partial.write_bytes(data[:begin] + bytes(end - begin) + data[end:])
        assert "x.beton.partial does not hold what was written to it" in self.refusal(images, folder)
        partial.unlink()
        assert ", found 0; put that right, or pass --restart to begin anew" in self.refusal(images, folder)
        again(images, folder, "one", restart=True)
        assert files(folder) == whole["one"]

    def test_restart_begins_anew_with_other_options(self, stopped):
        images, folder = stopped
        small = EncodeOptions(max_side=32)
        again(images, folder, "one", options=small, restart=True)
        (folder / "other").mkdir()
        again(images, folder / "other", "one", options=small)
        expected = files(folder / "other")
        (folder / "other").rename(folder.parent / "other")
        assert files(folder) == expected

    def test_restart_drops_the_shards_that_were_done(self, server, source, tmp_path):
        assert killed(server, source, tmp_path, "shards", 200) == KILLED
        assert (tmp_path / "x-00000.beton").exists()
        again(source, tmp_path, "shards", options=EncodeOptions(max_side=32), restart=True)
        assert sorted(files(tmp_path)) == [
            *("x-00000.beton", "x-00000.beton.json", "x.shards.json", "x.shards.json.quarantine.jsonl")
        ]

    def test_a_shard_that_was_done_and_is_gone(self, server, source, tmp_path, whole):
        assert killed(server, source, tmp_path, "shards", 200) == KILLED
        (tmp_path / "x-00000.beton").rename(tmp_path / "away")
        with pytest.raises(ValueError, match=r"x-00000\.beton was written whole, \d+ bytes, and is no longer there"):
            again(source, tmp_path, "shards")
        (tmp_path / "away").rename(tmp_path / "x-00000.beton")
        again(source, tmp_path, "shards")
        assert files(tmp_path) == whole["shards"]

    def test_another_conversion_to_the_same_place(self, stopped):
        images, folder = stopped
        with open_journal(folder / "x.beton.journal"):
            assert "x.beton.journal is being written by another process" in self.refusal(images, folder)


class TestWholeFile:
    def test_what_a_killed_process_left_is_taken_over(self, tmp_path):
        (tmp_path / "a.partial").write_bytes(b"a long half of something")
        with whole_file(tmp_path / "a") as file:
            file.write(b"whole")
        assert files(tmp_path) == {"a": b"whole"}

    def test_two_at_once_are_refused(self, tmp_path):
        with whole_file(tmp_path / "a") as file:
            with pytest.raises(ValueError, match=r"a\.partial is being written by another process"):
                self.write(tmp_path / "a")
            file.write(b"mine")
        assert files(tmp_path) == {"a": b"mine"}

    def write(self, path):
        with whole_file(path):
            pass

    def test_a_file_that_was_renamed_meanwhile_is_not_the_one(self, tmp_path, monkeypatch):
        """Between opening and locking, whoever held it renames it: the new holder must make one of its own."""
        import fcntl

        lock = fcntl.flock
        path = tmp_path / "a"

        def late(file, how):
            if not (tmp_path / "b").exists():
                path.rename(tmp_path / "b")
            lock(file, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with locked_file(path) as file:
            file.write(b"mine")
        assert files(tmp_path) == {"a": b"mine", "b": b""}


def test_an_interrupted_conversion_by_the_api_keeps_nothing_open(source, tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    convert(source, tmp_path / "x.beton", RAW, workers=1, page_size=PAGE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
