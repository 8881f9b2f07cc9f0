"""Checkpoints: exact contents, and files that are torn, foreign, or cut off by a kill or a full disk."""

import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
DAMAGED = r"^\S+ (is not a checkpoint, or was cut off or damaged|is damaged|is a safetensors file, but not|has )"


def small_checkpoint():
    generator = torch.Generator().manual_seed(3)
    return Checkpoint(
        model={
            "encoder.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "encoder.bn1.num_batches_tracked": torch.tensor(12),
        },
        optimizer={"encoder.conv1.weight": {"momentum": torch.randn(4, 3, 3, 3, generator=generator)}},
        position={"epoch": 1, "next_batch": 2, "step": 12},
        config={"name": "run", "optim": {"base_lr": 1e-3, "lr_scaling": "sqrt"}, "crop": [0.08, 1.0]},
        versions={"torch": "2.11.0"},
        loader={"crc32": "00c0ffee", "seed": 7},
    )


def assert_same(loaded, saved):
    assert set(loaded.model) == set(saved.model)
    assert {name: set(slots) for name, slots in loaded.optimizer.items()} == {
        name: set(slots) for name, slots in saved.optimizer.items()
    }
    for name, tensor in saved.model.items():
        assert_bit_equal(loaded.model[name], tensor)
    for name, slots in saved.optimizer.items():
        for slot, tensor in slots.items():
            assert_bit_equal(loaded.optimizer[name][slot], tensor)
    for section in ("position", "config", "versions", "loader"):
        assert getattr(loaded, section) == getattr(saved, section)


def assert_bit_equal(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    assert torch.equal(*as_bytes)


# What goes in comes out


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(6, 8)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    saved = Checkpoint(
        model={
            "fp32": special,
            "fp64": special.double(),
            "bf16": torch.randn(5).bfloat16(),
            "fp16": torch.randn(5).half(),
            "int64": torch.tensor([-(2**63), 2**63 - 1]),
            "bool": torch.tensor([True, False]),
            "uint8": torch.arange(256, dtype=torch.uint8),
            "scalar": torch.tensor(3),
            "empty": torch.empty(0, 4),
            "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "transposed": base.T,
            "strided": base[::2, ::3],
            "tied": base,
            "tied too": base,
            "overlapping": base[2:4],
            "parameter": torch.nn.Parameter(torch.randn(3)),
            "with.dots.and é": torch.ones(1),
        },
        optimizer={
            "fp32": {"momentum": special},
            "a.b.c": {"momentum": torch.ones(2), "second": torch.tensor(1)},
        },
        position={"epoch": 0, "next_batch": 0, "step": 0, "nested": {"list": [1, 2.5, None, "x\n\"'é"]}},
        config={"lr": 0.1 + 0.2},
    )
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, saved)
    assert_same(load_checkpoint(path), saved)


def test_other_tools_read_the_file(tmp_path):
    saved = small_checkpoint()
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, saved)
    tensors = load_file(path)
    assert set(tensors) == {
        "model.encoder.conv1.weight",
        "model.encoder.bn1.num_batches_tracked",
        "optimizer.encoder.conv1.weight.momentum",
    }
    assert torch.equal(tensors["model.encoder.conv1.weight"], saved.model["encoder.conv1.weight"])


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, small_checkpoint())
    loaded = load_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same(loaded, small_checkpoint())


def test_equal_checkpoints_are_equal_files(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, small_checkpoint())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_again_replaces_the_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "folder" / "step.safetensors"
    save_checkpoint(path, small_checkpoint())
    newer = replace(small_checkpoint(), position={"epoch": 5, "next_batch": 0, "step": 60})
    save_checkpoint(path, newer)
    assert_same(load_checkpoint(path), newer)
    assert [file.name for file in path.parent.iterdir()] == ["step.safetensors"]


# The checkpoints of a run


def test_the_latest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (9, 1_000_000_000, 10):
        save_checkpoint(checkpoint_path(tmp_path, step), small_checkpoint())
    folder = tmp_path / "checkpoints"
    for other in (
        "step-x.safetensors",
        ".step-9999999999.safetensors.partial",
        "step-5.pt",
        "best.safetensors",
    ):
        (folder / other).touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-000000009.safetensors",
        "step-000000010.safetensors",
        "step-1000000000.safetensors",
    ]
    assert latest_checkpoint(tmp_path) == folder / "step-1000000000.safetensors"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(checkpoint_path(tmp_path, step), small_checkpoint())
    kept = tmp_path / "checkpoints" / "best.safetensors"
    kept.touch()
    prune_checkpoints(tmp_path, keep_last=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 3), checkpoint_path(tmp_path, 10)]
    assert kept.exists()
    prune_checkpoints(tmp_path, keep_last=5)
    assert len(list_checkpoints(tmp_path)) == 2
    with pytest.raises(ValueError, match="`keep_last` must be at least 1, got 0"):
        prune_checkpoints(tmp_path, keep_last=0)


# Files that are not what they should be


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, small_checkpoint())
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert re.match(DAMAGED, refusal(path)), size
    path.write_bytes(whole + b"\0")
    assert re.match(DAMAGED, refusal(path))
    path.write_bytes(whole)
    assert_same(load_checkpoint(path), small_checkpoint())


def test_one_flipped_bit_anywhere_is_refused(tmp_path):
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, small_checkpoint())
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        assert re.match(DAMAGED, refusal(path)), (position, position % 8)


def test_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"model.conv1.weight": torch.ones(2)}, path, {"format": "pt"})
    assert refusal(path) == (
        f"{path} is a safetensors file, but not a checkpoint of a Twinview run; "
        "give a file that `train/pretrain.py` wrote"
    )
    unreadable = r"\S+ is not a checkpoint, or was cut off or damaged \(.*\); resume from another one$"
    path = tmp_path / "weights.pt"
    torch.save({"model": torch.ones(2)}, path)
    assert re.match(unreadable, refusal(path))
    path = tmp_path / "notes.safetensors"
    path.write_text("not a checkpoint at all, but longer than eight bytes")
    assert re.match(unreadable, refusal(path))
    assert refusal(tmp_path / "missing") == (
        f"there is no checkpoint {tmp_path / 'missing'}; give the path of a file in `checkpoints/` of a run"
    )
    assert "there is no checkpoint" in refusal(tmp_path)


def test_a_newer_format_is_refused_by_name(tmp_path):
    path = tmp_path / "step.safetensors"
    save_file({}, path, {"format": "twinview-checkpoint", "version": "2", "something": "new"})
    assert refusal(path) == f"{path} has checkpoint format 2, this Twinview reads 1; update Twinview"


# Saves that do not come to their end


def save_for_ever(path):
    for step in range(10**9):
        values = torch.full((500_000,), float(step))
        save_checkpoint(path, Checkpoint(model={"a": values, "b": values + 0.5}, position={"step": step}))


@pytest.fixture(scope="module")
def processes():
    """Processes that start in a moment: forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.checkpoint"])
    return context


def test_a_killed_save_leaves_a_whole_file(tmp_path, processes):
    path = tmp_path / "step.safetensors"
    delays = random.Random(0)
    left_behind = 0  # a third of the kills or fewer hit a save
    for num_kills in itertools.count(1):
        process = processes.Process(target=save_for_ever, args=(path,), daemon=True)
        path.unlink(missing_ok=True)
        process.start()
        deadline = time.monotonic() + 60
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delays.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        loaded = load_checkpoint(path)
        assert bool((loaded.model["a"] == loaded.position["step"]).all())
        assert bool((loaded.model["b"] == loaded.position["step"] + 0.5).all())
        left_behind += sum(file != path for file in tmp_path.iterdir())
        if num_kills >= 10 and left_behind >= 2:
            break
        assert num_kills < 200, "no kill hit a save: the test shows nothing"


def test_remains_of_a_killed_save_are_removed_by_the_next(tmp_path):
    (tmp_path / ".step-000000003.safetensors.partial").write_bytes(b"half of it")
    (tmp_path / "notes.partial").touch()
    save_checkpoint(tmp_path / "step-000000004.safetensors", small_checkpoint())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.partial", "step-000000004.safetensors"]


SAVE_TOO_MUCH = """
import resource, sys
from pathlib import Path
import torch
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
path = folder / "step.safetensors"
save_checkpoint(path, Checkpoint(model={"a": torch.ones(1000)}, position={"step": 1}))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(path, Checkpoint(model={"a": torch.ones(10**6)}, position={"step": 2}))
except OSError as error:
    print(error)
loaded = load_checkpoint(path)
print(loaded.position["step"], float(loaded.model["a"].sum()), [file.name for file in folder.iterdir()])
"""


def assert_survived(output, folder, reason):
    message, state = output.splitlines()
    assert message.startswith(f"checkpoint {folder}/step.safetensors could not be written (")
    assert reason in message
    assert message.endswith("); the previous one is untouched")
    assert state == "1 1000.0 ['step.safetensors']"


def run(*command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_write_beyond_the_size_limit_leaves_the_previous_file(tmp_path):
    result = run(sys.executable, "-c", SAVE_TOO_MUCH, tmp_path, str(2**20))
    assert result.returncode == 0, result.stderr
    assert_survived(result.stdout, tmp_path, "File too large")


def test_a_full_disk_leaves_the_previous_file(tmp_path):
    # In a mount namespace of its own, which goes with the process whatever happens.
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}"
    if shutil.which("unshare") is None or run("unshare", "-rm", "sh", "-c", mount).returncode != 0:
        pytest.skip("no permission to mount a small tmpfs")
    script = f'{mount} && exec "$0" -c "$1" {tmp_path} 0'
    result = run("unshare", "-rm", "sh", "-c", script, sys.executable, SAVE_TOO_MUCH)
    assert result.returncode == 0, result.stderr
    assert_survived(result.stdout, tmp_path, "No space left on device")


def test_a_type_that_no_file_can_hold_is_named(tmp_path):
    strange = Checkpoint(model={"phase": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"cannot hold `model\.phase` of torch\.complex64"):
        save_checkpoint(tmp_path / "step.safetensors", strange)
    assert list(tmp_path.iterdir()) == []
