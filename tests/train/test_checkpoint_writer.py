"""Checkpoints in the background: what is written is what was saved, and what becomes of writes that fail."""

import gc
import logging
import shutil
import subprocess
import threading
import weakref

import pytest
import torch

from train.checkpoint import Checkpoint, checkpoint_path, list_checkpoints, load_checkpoint
from train.checkpoint_keeping import KeepConfig
from train.checkpoint_writer import CheckpointWriter, HostMemory
from train.cli import RunFailed

KEEP = KeepConfig(last=2)


def state(step, size=1000):
    return Checkpoint(
        model={
            "weight": torch.full((size, 3), float(step)),
            "conv": torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last),
            "half": torch.randn(7).bfloat16(),
            "count": torch.tensor(step),
            "flags": torch.tensor([True, False, True]),
            "none": torch.empty(0, 4),
            "strided": torch.randn(6, 8)[::2, ::3],
        },
        optimizer={"weight": {"momentum": torch.full((size, 3), step + 0.5)}},
        average={"weight": torch.full((size, 3), step + 0.25)},
        probe={"weight": torch.full((5,), step + 0.125)},
        position={"step": step},
        config={"list": [step]},
    )


def tensors_of(checkpoint):
    return checkpoint.model | checkpoint.average | checkpoint.probe | checkpoint.optimizer["weight"]


def saved_steps(run_dir):
    return [load_checkpoint(path).position["step"] for path in list_checkpoints(run_dir)]


@pytest.fixture(params=[True, False], ids=["background", "in the step"])
def background(request):
    return request.param


def block(run_dir):
    """A file where the folder of the checkpoints should be: what a disk that fails looks like, for root as well."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "checkpoints").write_text("in the way")


def test_what_is_written_is_the_moment_of_the_save(tmp_path, background):
    with CheckpointWriter(tmp_path, keep=KEEP, background=background) as writer:
        for step in (1, 2, 3):
            checkpoint = state(step)
            expected = {name: tensor.clone() for name, tensor in tensors_of(checkpoint).items()}
            writer.save(checkpoint)
            for tensor in tensors_of(checkpoint).values():
                tensor.zero_()  # as the next step would
            checkpoint.config["list"].append("later")
        writer.finish()
        loaded = load_checkpoint(checkpoint_path(tmp_path, 3))
        for name, tensor in tensors_of(loaded).items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.dtype == expected[name].dtype
        assert loaded.model["weight"].dtype == torch.float32
        assert loaded.config == {"list": [3]}
        assert saved_steps(tmp_path) == [2, 3]


def test_the_end_waits_for_the_write(tmp_path):
    """Also where an error ends the run."""

    def interrupted():
        with CheckpointWriter(tmp_path, keep=KEEP) as writer:
            writer.save(state(1, size=3_000_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert saved_steps(tmp_path) == [1]
    with CheckpointWriter(tmp_path, keep=KEEP) as writer:
        writer.save(state(2))
    assert saved_steps(tmp_path) == [1, 2]


def test_a_save_returns_before_the_file_is_there(tmp_path):
    """However long the write takes."""
    held = threading.Event()
    with CheckpointWriter(tmp_path, keep=KEEP) as writer:
        original = writer._write

        def held_write(*arguments):
            held.wait()
            original(*arguments)

        writer._write = held_write
        writer.save(state(1))
        assert list_checkpoints(tmp_path) == []
        held.set()
        writer.finish()
        assert saved_steps(tmp_path) == [1]


def test_no_reference_to_the_runs_tensors_stays(tmp_path, background):
    with CheckpointWriter(tmp_path, keep=KEEP, background=background) as writer:
        checkpoint = state(1)
        watched = [weakref.ref(tensor) for tensor in tensors_of(checkpoint).values()]
        writer.save(checkpoint)
        del checkpoint
        gc.collect()
        assert [reference() for reference in watched] == [None] * len(watched)


def test_host_memory_is_used_again_and_grows_where_it_must():
    memory = HostMemory()
    small = {"a": torch.ones(10), "b": torch.ones(3, dtype=torch.float64)}
    first, ready = memory.copy(small)
    assert ready is None
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert all(address % 8 == 0 for address in addresses.values())
    again, _ = memory.copy({name: tensor + 1 for name, tensor in small.items()})
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == addresses
    assert torch.equal(first["a"], torch.full((10,), 2.0))
    larger, _ = memory.copy(small | {"c": torch.arange(1000)})
    assert torch.equal(larger["c"], torch.arange(1000))
    assert torch.equal(larger["b"], small["b"])
    channels_last = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    kept = memory.copy({"a": channels_last})[0]["a"]
    assert kept.stride() == channels_last.stride()
    assert torch.equal(kept, channels_last)


def test_a_failed_write_is_a_warning_and_the_next_one_succeeds(tmp_path, background, caplog):
    block(tmp_path)
    path = checkpoint_path(tmp_path, 1)
    with CheckpointWriter(tmp_path, keep=KEEP, background=background) as writer:
        writer.save(state(1))
        with pytest.raises(RunFailed) as caught:
            writer.finish()
        reason = f"checkpoint {path} could not be written (File exists); the previous one is untouched"
        assert (
            str(caught.value) == f"the newest state is not saved: {reason}; mend that, and start again to go on from it"
        )
        assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
            (logging.WARNING, f"{reason}; training goes on (failure 1, 3 in a row end the run)")
        ]
        writer.save(state(2))
        (tmp_path / "checkpoints").unlink()
        caplog.clear()
        writer.save(state(3))
        writer.finish()
        writer.save(state(4))
        writer.finish()
    assert saved_steps(tmp_path) == [3, 4]


def test_the_third_failure_in_a_row_ends_the_run_at_once(tmp_path, background):
    with CheckpointWriter(tmp_path, keep=KEEP, background=background) as writer:
        block(tmp_path)
        writer.save(state(1))
        writer.save(state(2))
        (tmp_path / "checkpoints").unlink()
        writer.save(state(3))  # ends the row
        writer.finish()
        shutil.rmtree(tmp_path / "checkpoints")
        block(tmp_path)
        writer.save(state(4))
        writer.save(state(5))
        with pytest.raises(RunFailed, match=r"^3 checkpoints in a row failed: .*step-000000006.* could not be written"):
            writer.save(state(6))


def test_an_error_of_another_kind_reaches_the_run(tmp_path, background):
    with CheckpointWriter(tmp_path, keep=KEEP, background=background) as writer:
        writer.save(state(1))
        writer.finish()
        with pytest.raises(ValueError, match=r"cannot hold `model\.phase` of torch\.complex64"):
            writer.save(Checkpoint(model={"phase": torch.ones(2, dtype=torch.complex64)}, position={"step": 2}))
        writer.finish()
    assert saved_steps(tmp_path) == [1]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, background, caplog):
    with CheckpointWriter(tmp_path, keep=KeepConfig(last=1), background=background) as writer:
        writer.save(state(1))
        writer.finish()
        old = checkpoint_path(tmp_path, 1)
        if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", old], check=False).returncode != 0:
            pytest.skip("no permission to make a file immutable")
        try:
            writer.save(state(2))
            writer.finish()
        finally:
            subprocess.run(["chattr", "-i", old], check=True)
    assert saved_steps(tmp_path) == [1, 2]
    assert "an old checkpoint could not be deleted" in caplog.text
