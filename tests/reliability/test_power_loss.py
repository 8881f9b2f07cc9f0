"""Power lost while checkpoints are written: an ext4 on a loop device, and images of what the device holds at moments.

An image counts where the device was idle and had taken no write while it was copied, so that it is what the disk held
at one moment. Mounting it runs the journal's recovery, as the next boot would.
"""

import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.reliability.file_systems import mounted, tmpfs
from tests.reliability.record import record
from tests.train.runs import start
from train.checkpoint import list_checkpoints, load_checkpoint
from train.checkpoint_keeping import newest_whole_checkpoint

IMAGE_BYTES = 6 * 2**20


@pytest.fixture
def disk(tmp_path):
    """(image, folder where its ext4 is mounted, its loop device's statistics)."""
    with tmpfs(tmp_path / "memory", 3 * IMAGE_BYTES // 1024) as memory:
        image = memory / "disk.img"
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        made = run("mkfs.ext4", "-q", "-F", "-b", "1024", image)
        if made.returncode != 0:
            pytest.skip(f"mkfs.ext4 cannot be run: {made.stderr}")
        with loop_device(image) as device, mounted(tmp_path / "disk", device) as folder:
            yield image, folder, Path("/sys/block", Path(device).name, "stat")


@contextmanager
def loop_device(image):
    found = run("losetup", "--find", "--show", image)
    if found.returncode != 0:
        pytest.skip(f"no permission to make a loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def run(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def device_writes(statistics):
    """(writes done, in flight)."""
    fields = statistics.read_text(encoding="ascii").split()
    return int(fields[4]), int(fields[8])


def image_of_a_moment(image, statistics, target):
    """Copy what the device holds; returns how many writes it had taken."""
    while True:
        before = device_writes(statistics)
        target.write_bytes(image.read_bytes())
        if before == device_writes(statistics) and before[1] == 0:
            return before[0]


@pytest.mark.parametrize("num_images", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_the_disk_holds_a_whole_checkpoint_at_every_moment(tmp_path, disk, num_images):
    image, folder, statistics = disk
    moments = random.Random(5)
    command = [sys.executable, "-m", "tests.reliability.checkpoint_writers", "lines", folder / "run"]
    process = start(command, stdin=subprocess.PIPE)
    begun, at_writes = [], set()
    try:
        saved = save(process, 1)
        for i in range(num_images):
            saved = save(process, moments.randrange(1, 4))
            num_begun = i % 2 * 3  # at rest, or while these are written
            process.stdin.write("\n" * num_begun)
            process.stdin.flush()
            time.sleep(moments.uniform(0.0, 0.03) if num_begun else 0.0)
            at_writes.add(image_of_a_moment(image, statistics, image.with_name("crash.img")))
            begun.append(check_recovered(image.with_name("crash.img"), tmp_path / f"recovered{i}", saved=saved))
            for _ in range(num_begun):
                process.stdout.readline()
    finally:
        process.kill()
        process.communicate()
    assert len(at_writes) > num_images // 2  # different moments
    record(
        fault="power loss in the middle of a checkpoint write",
        done="images of an ext4's device at seeded moments of a process that does nothing but save; journal recovered",
        runs=num_images,
        lost_steps="none that was reported saved",
        result=f"no torn file bears a checkpoint's name; {sum(begun)} images hold one still being written",
    )


def save(process, count):
    """Returns the last step that is saved."""
    process.stdin.write("\n" * count)
    process.stdin.flush()
    return [int(process.stdout.readline()) for _ in range(count)][-1]


def check_recovered(image, folder, *, saved):
    """Every file is whole, and one is of the step that was reported saved, or later; returns whether one was begun."""
    with loop_device(image) as device, mounted(folder, device):
        paths = list_checkpoints(folder / "run")
        assert paths
        for path in paths:
            checkpoint = load_checkpoint(path)
            number = checkpoint.position["step"]
            assert bool((checkpoint.model["weight"] == number).all())
            assert torch.equal(checkpoint.optimizer["weight"]["momentum"], checkpoint.model["weight"] + 0.5)
        assert newest_whole_checkpoint(folder / "run")[1].position["step"] >= saved
        return any((folder / "run" / "checkpoints").glob(".*.partial"))
