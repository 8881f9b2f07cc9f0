"""Checkpoints: exact contents, and files that are no checkpoints, or of another format.

What faults do to them: `tests/reliability`.
"""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_sections,
    save_checkpoint,
    section_texts,
    write_checkpoint,
)

DAMAGED = r"\S+ (is not a checkpoint, or was cut off or damaged \(.*\)|is damaged: .*); resume from another one$"


def small_checkpoint():
    generator = torch.Generator().manual_seed(3)
    return Checkpoint(
        model={
            "encoder.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "encoder.bn1.num_batches_tracked": torch.tensor(12),
        },
        optimizer={"encoder.conv1.weight": {"momentum": torch.randn(4, 3, 3, 3, generator=generator)}},
        average={"encoder.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator)},
        probe={"weight": torch.randn(2, 4, generator=generator), "momentum.weight": torch.ones(2, 4)},
        position={"epoch": 1, "next_batch": 2, "step": 12},
        config={"name": "run", "optim": {"base_lr": 1e-3, "lr_scaling": "sqrt"}, "crop": [0.08, 1.0]},
        versions={"torch": "2.11.0"},
        loader={"crc32": "00c0ffee", "seed": 7},
    )


def assert_same(loaded, saved):
    for part in ("model", "average", "probe"):
        ours, theirs = getattr(loaded, part), getattr(saved, part)
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert_bit_equal(ours[name], tensor)
    assert {name: set(slots) for name, slots in loaded.optimizer.items()} == {
        name: set(slots) for name, slots in saved.optimizer.items()
    }
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
        "average.encoder.conv1.weight",
        "probe.weight",
        "probe.momentum.weight",
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


# Files that are not what they should be


def refusal(path, kind=ValueError):
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path)
    assert caught.type is kind
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_foreign_safetensors_are_refused_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    refused = f"{path} is a safetensors file, but not a checkpoint of a Twinview run; give a file that "
    for tensors in ({"model.conv1.weight": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, {}):
        for metadata in ({"format": "pt"}, None):
            save_file(tensors, path, metadata)
            assert refusal(path) == refused + "`train/pretrain.py` wrote"


class Pest:
    """Runs when its pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_refused_unread(tmp_path):
    path = tmp_path / "weights.pt"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"model": torch.ones(2), "pest": Pest(tmp_path / "pest")}, path, **options)
        assert "is a pickle, as `torch.save` writes it, and not a checkpoint of a Twinview run" in refusal(path)
        assert not (tmp_path / "pest").exists()


def test_what_is_no_file_is_refused_at_once(tmp_path):
    assert refusal(tmp_path / "missing") == (
        f"there is no checkpoint {tmp_path / 'missing'}; give the path of a file in `checkpoints/` of a run"
    )
    os.mkfifo(tmp_path / "fifo")  # which would wait for a writer
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "missing")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "dangling", Path("/dev/zero")):
        assert refusal(path) == f"{path} is not a file; give the path of a file in `checkpoints/` of a run"


def header(text):
    return len(text).to_bytes(8, "little") + text


def entry(**changes):
    metadata = {"format": "twinview-checkpoint", "version": "2"}
    return {"__metadata__": metadata, "model.a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        random.Random(0).randbytes(5000),
        b"not a checkpoint at all, but longer than eight bytes",
        (2**63).to_bytes(8, "little") + bytes(100),
        header(b"[1, 2]"),
        header(b"[" * 100_000),
        header(b'{"__metadata__": [1]}'),
        header(b'{"__metadata__": {"format": 1}}'),
        *(
            header(json.dumps(entry(**changes)).encode()) + bytes(8)
            for changes in (
                {"dtype": "F8_E4M3"},
                {"dtype": ["F32"]},
                {"shape": [2**62, 2**62]},
                {"shape": [-2, -1]},
                {"shape": [0, 2**62, 4], "data_offsets": [0, 0]},
                {"shape": "2"},
                {"data_offsets": [8, 16]},
                {"data_offsets": [-8, 0]},
                {"data_offsets": [0, 2**70]},
                {"data_offsets": [0]},
            )
        ),
        header(json.dumps(entry()).encode()) + bytes(8),  # neither checksum nor sections
    ],
)
def test_what_was_never_whole_is_taken_for_damaged(tmp_path, content):
    path = tmp_path / "step.safetensors"
    path.write_bytes(content)
    assert re.match(DAMAGED, refusal(path, DamagedCheckpoint))


def test_sections_that_are_no_dictionaries_are_damage(tmp_path):
    path = tmp_path / "step.safetensors"
    texts = section_texts(small_checkpoint())
    for text in ("[1]", "{", "[" * 100_000):
        write_checkpoint(path, {}, texts | {"position": text})
        assert re.match(DAMAGED, refusal(path, DamagedCheckpoint))
    write_checkpoint(path, {"other.a": torch.ones(1)}, texts)
    assert refusal(path) == f"{path} holds a tensor `other.a`, which no checkpoint of a Twinview run has"


def test_a_newer_format_is_refused_by_name(tmp_path):
    path = tmp_path / "step.safetensors"
    save_file({}, path, {"format": "twinview-checkpoint", "version": "3", "something": "new"})
    assert refusal(path) == f"{path} has checkpoint format 3, this Twinview reads up to 2; update Twinview"


def test_files_of_earlier_releases_are_read(tmp_path):
    """As version 1 wrote them, checksum and all."""
    path = tmp_path / "step.safetensors"
    weight = torch.arange(6.0).reshape(2, 3) / 7
    tensors = {
        "model.encoder.conv1.weight": weight,
        "model.encoder.bn1.num_batches_tracked": torch.tensor(12),
        "optimizer.encoder.conv1.weight.momentum": torch.full((2, 3), 0.25),
    }
    metadata = {
        "format": "twinview-checkpoint",
        "version": "1",
        "position": '{"norm_batch_size": 16, "step": 12}',
        "config": '{"name": "run", "seed": 7}',
        "versions": '{"torch": "2.11.0"}',
        "loader": '{"epoch": 1, "next_batch": 2}',
        "crc32": "4a17fa0d",
    }
    save_file(tensors, path, metadata)
    loaded = load_checkpoint(path)
    assert_bit_equal(loaded.model["encoder.conv1.weight"], weight)
    assert_bit_equal(loaded.optimizer["encoder.conv1.weight"]["momentum"], torch.full((2, 3), 0.25))
    assert loaded.position == {"step": 12, "norm_batch_size": 16}
    assert (loaded.average, loaded.probe) == ({}, {})
    save_file(tensors, path, metadata | {"loader": '{"epoch": 1, "next_batch": 3}'})
    assert "does not match its checksum" in refusal(path, DamagedCheckpoint)


def test_the_beginning_tells_the_position(tmp_path):
    path = tmp_path / "step.safetensors"
    save_checkpoint(path, small_checkpoint())
    assert read_sections(path)["position"] == {"epoch": 1, "next_batch": 2, "step": 12}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint):
        read_sections(path)


# Saves that do not come to their end


def test_remains_of_a_killed_save_are_removed_by_the_next(tmp_path):
    (tmp_path / ".step-000000003.safetensors.partial").write_bytes(b"half of it")
    (tmp_path / "notes.partial").touch()
    save_checkpoint(tmp_path / "step-000000004.safetensors", small_checkpoint())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.partial", "step-000000004.safetensors"]


def test_a_type_that_no_file_can_hold_is_named(tmp_path):
    strange = Checkpoint(model={"phase": torch.ones(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"cannot hold `model\.phase` of torch\.complex64"):
        save_checkpoint(tmp_path / "step.safetensors", strange)
    assert list(tmp_path.iterdir()) == []
