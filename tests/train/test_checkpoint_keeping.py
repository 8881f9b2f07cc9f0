"""Which checkpoints stay, and which one a run goes on from."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from train.checkpoint import Checkpoint, checkpoint_path, list_checkpoints, save_checkpoint
from train.checkpoint_keeping import (
    KeepConfig,
    Saved,
    best_checkpoint,
    newest_whole_checkpoint,
    prune_checkpoints,
    saved_at,
    steps_to_keep,
)


def epochs(*losses):
    """Checkpoints at the end of each epoch of 10 steps."""
    return [
        Saved(step=10 * (i + 1), epoch=i, epoch_ended=True, scores={"loss": loss, "knn_accuracy": 1 - loss})
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (KeepConfig(last=2), {40, 50}),
        (KeepConfig(last=9), {10, 20, 30, 40, 50}),
        (KeepConfig(last=1, best="loss"), {20, 50}),
        (KeepConfig(last=1, best="knn_accuracy"), {20, 50}),
        (KeepConfig(last=1, best="probe_accuracy"), {50}),
        (KeepConfig(last=1, every_epochs=2), {20, 40, 50}),
        (KeepConfig(last=1, best="loss", every_epochs=3), {20, 30, 50}),
    ],
)
def test_what_stays(keep, expected):
    saved = epochs(0.9, 0.2, math.nan, 0.2, math.inf)  # the first of equals is the best
    assert steps_to_keep(saved, keep) == expected
    assert steps_to_keep(saved[::-1], keep) == expected


def test_checkpoints_inside_an_epoch_are_neither_best_nor_every():
    inside = [saved_at({"step": 3, "epoch": 0, "epoch_ended": False, "scores": {}}), saved_at({"step": 5})]
    assert steps_to_keep(inside + epochs(0.5), KeepConfig(last=1, best="loss", every_epochs=1)) == {10}
    assert steps_to_keep(inside, KeepConfig(last=1, best="loss", every_epochs=1)) == {5}


@given(
    losses=st.lists(st.floats(width=16), min_size=1, max_size=30),
    last=st.integers(1, 4),
    every=st.integers(0, 4),
)
@settings(max_examples=200, deadline=None)
def test_pruning_as_the_run_goes_keeps_what_pruning_at_the_end_would(losses, last, every):
    keep = KeepConfig(last=last, best="loss", every_epochs=every)
    kept = []
    for one in epochs(*losses):
        steps = steps_to_keep([*kept, one], keep)
        kept = [old for old in [*kept, one] if old.step in steps]
    assert {one.step for one in kept} == steps_to_keep(epochs(*losses), keep)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert not finite or min(finite) in [one.scores["loss"] for one in kept]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="`last` must be at least 1, got 0"):
        KeepConfig(last=0)
    with pytest.raises(ValueError, match="`every_epochs` must be at least 0, got -1"):
        KeepConfig(every_epochs=-1)


# The files


def save(run_dir, step, loss=None, *, keep_best="loss"):
    position = {"step": step, "epoch": step // 10 - 1, "epoch_ended": loss is not None}
    position["scores"] = {} if loss is None else {"loss": loss, "probe_accuracy": loss}
    checkpoint = Checkpoint(
        model={"a": torch.full((4,), step)}, position=position, config={"train": {"keep_best": keep_best}}
    )
    save_checkpoint(checkpoint_path(run_dir, step), checkpoint)


def steps(run_dir):
    return [int(path.stem.removeprefix("step-")) for path in list_checkpoints(run_dir)]


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_a_nan_never_costs_the_best(tmp_path):
    keep = KeepConfig(last=1, best="loss")
    for step, loss in ((10, 0.5), (20, 0.3), (25, None), (30, math.nan), (40, 0.4), (50, math.nan)):
        save(tmp_path, step, loss)
        prune_checkpoints(tmp_path, keep, newest=step)
    assert steps(tmp_path) == [20, 50]
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 20)


def test_files_that_cannot_be_read_and_later_steps_are_left_alone(tmp_path):
    """As after a resume from an older checkpoint, because newer ones were damaged."""
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
    cut_off(checkpoint_path(tmp_path, 20))
    damage(checkpoint_path(tmp_path, 50))
    save(tmp_path, 35)
    prune_checkpoints(tmp_path, KeepConfig(last=1), newest=35)
    assert steps(tmp_path) == [20, 35, 40, 50]
    prune_checkpoints(tmp_path, KeepConfig(last=1), newest=20)  # which is torn: nothing newer is whole for certain
    assert steps(tmp_path) == [20, 35, 40, 50]


def test_the_best_is_compared_by_the_runs_own_metric(tmp_path):
    assert best_checkpoint(tmp_path) is None
    for step, score in ((10, 0.5), (20, 0.3), (30, 0.9)):
        save(tmp_path, step, score, keep_best="probe_accuracy")
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 30)
    assert best_checkpoint(tmp_path, "loss") == checkpoint_path(tmp_path, 20)
    assert best_checkpoint(tmp_path, "knn_accuracy") is None
    save(tmp_path, 40, 0.8, keep_best="none")
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, 20)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, caplog):
    assert newest_whole_checkpoint(tmp_path) is None
    for step in (10, 20, 30):
        save(tmp_path, step)
    path, checkpoint = newest_whole_checkpoint(tmp_path)
    assert (path, checkpoint.position["step"]) == (checkpoint_path(tmp_path, 30), 30)
    assert torch.equal(checkpoint.model["a"], torch.full((4,), 30))
    assert caplog.records == []
    damage(checkpoint_path(tmp_path, 30))
    cut_off(checkpoint_path(tmp_path, 20))
    assert newest_whole_checkpoint(tmp_path)[1].position["step"] == 10
    assert [(record.levelno, record.getMessage().split(" is ")[0]) for record in caplog.records] == [
        (logging.WARNING, "step-000000030.safetensors"),
        (logging.WARNING, "step-000000020.safetensors"),
    ]
    checkpoint_path(tmp_path, 10).write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        newest_whole_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"all checkpoints in {tmp_path / 'checkpoints'} are damaged (step-000000030.safetensors, "
        f"step-000000020.safetensors, step-000000010.safetensors); put back a whole one, or remove {tmp_path} to "
        "start over"
    )


def test_a_foreign_file_in_the_way_stops_the_run(tmp_path):
    save(tmp_path, 10)
    path = checkpoint_path(tmp_path, 20)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is a safetensors file, but not a checkpoint of a Twinview run"):
        newest_whole_checkpoint(tmp_path)
    save_file({}, path, {"format": "twinview-checkpoint", "version": "3"})
    with pytest.raises(ValueError, match="has checkpoint format 3, this Twinview reads up to 2; update Twinview"):
        newest_whole_checkpoint(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is not a file"):
        newest_whole_checkpoint(tmp_path)
