"""A `.beton` that is cut or written to while it is read: one line, before a page is touched that is no longer there."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import BetonError
from pipelines.build import DataConfig, build_loader
from tests.pipelines.betons import make_beton
from tests.reliability.processes import kill_stragglers, num_checkpoints, wait_for
from tests.reliability.record import record
from tests.train.runs import ROOT, finish, pretrain, start

SIMCLR = build_recipe(AugmentConfig(size=16))


@pytest.fixture
def beton(tmp_path):
    return make_beton(tmp_path, [(30, 20)] * 32)


@pytest.fixture
def load(beton):
    made = []

    def make(kind):
        config = DataConfig(path=str(beton.path), loader=kind, global_batch_size=4, num_threads=1)
        ranks = {"seed": 0, "rank": 0, "world_size": 1, "num_cores": 1}
        made.append(build_loader(config, beton, SIMCLR, device=torch.device("cpu"), dtype=torch.float32, **ranks))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def cut(path):
    """The last byte only: no page goes, so whoever does not look notices nothing."""
    os.truncate(path, path.stat().st_size - 1)


def write_in_place(path):
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"\2")  # what is there already
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # however coarse the file system's clock


CHANGES = [(cut, r"\(it had \d+ bytes and has \d+\)"), (write_in_place, r"\(in its place\)")]


@pytest.mark.parametrize(("change", "how"), CHANGES)
@pytest.mark.parametrize("kind", ["ffcv", "dali"])
def test_a_loader_stops_at_a_file_that_was_changed(beton, load, kind, change, how):
    batches = load(kind).epoch(0)
    next(batches)
    change(beton.path)
    with pytest.raises(BetonError, match=f"set.beton: changed while it was being read {how}; start again") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "how"), CHANGES)
def test_a_resident_set_is_read_from_a_file_that_stayed_as_it_was(beton, load, change, how):
    change(beton.path)
    with pytest.raises(BetonError, match=how):
        load("resident")


def test_damage_that_comes_from_a_change_is_not_blamed_on_a_sample(beton, load):
    batches = load("ffcv").epoch(0)
    next(batches)
    with beton.path.open("r+b") as file:
        for offset in beton.offsets.tolist():
            os.pwrite(file.fileno(), bytes(8), offset)
    os.utime(beton.path, ns=(0, 0))
    with pytest.raises(BetonError, match="changed while it was being read"):
        list(batches)


@pytest.mark.parametrize("how", ["renamed over", "removed"])
def test_a_file_that_is_replaced_or_removed_is_read_to_its_end(beton, load, how):
    expected = [batch.views[0].clone() for batch in load("ffcv").epoch(0)]
    batches = load("ffcv").epoch(0)
    found = [next(batches).views[0].clone()]
    if how == "removed":
        beton.path.unlink()
    else:
        other = beton.path.with_name("other")
        other.write_bytes(b"another file")
        other.replace(beton.path)
    found += [batch.views[0].clone() for batch in batches]
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)


def check_permissions(run_dir):
    """Nothing that a run writes may be changed by everybody, nor be run."""
    written = [run_dir, *run_dir.rglob("*")]
    assert len(written) > 4
    for path in written:
        assert path.stat().st_mode & 0o002 == 0, path
        assert path.is_dir() or path.stat().st_mode & 0o111 == 0, path


def test_a_run_whose_file_is_cut_ends_in_a_line(tmp_path):
    path = make_beton(tmp_path, [(24, 24)] * 32, encode="raw").path
    command = pretrain(tmp_path / "runs", path, "--train.epochs=100000")
    run_dir = tmp_path / "runs" / "run"
    process = start(command, umask=0o022)
    try:
        wait_for(lambda: num_checkpoints(run_dir) >= 1, process)
        cut(path)
        code, _, error = finish(process)
    finally:
        kill_stragglers(tmp_path / "runs")
    assert code == 2, error
    (line,) = [line for line in error.splitlines() if "changed while it was being read" in line]
    assert "set.beton" in line
    assert "Traceback" not in error
    check_permissions(run_dir)
    record(
        fault="data file cut during a run",
        done="the `.beton` truncated in place",
        runs=1,
        lost_steps="those since the last checkpoint",
        result="one line that names the file and what to do, exit code 2",
    )


SIGBUS = """
import faulthandler, os, sys
from pathlib import Path
from pipelines.beton import open_beton
faulthandler.enable(Path(sys.argv[2]).open("w"))
beton = open_beton(sys.argv[1])
os.truncate(sys.argv[1], 0)
beton.encoded(0).sum()
"""


def test_a_page_that_is_gone_leaves_a_stack(beton, tmp_path):
    """Between two looks nothing can be done: the kernel kills who touches the map. The stack says where."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", SIGBUS, str(beton.path), str(log)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in log.read_text()
