"""Views that grow during a run: their sides, their draws, and whole runs that are killed in each phase."""

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.build import DataConfig, build_loader, open_data
from tests.pipelines.betons import make_beton
from tests.reliability.forked import KILLED, Run
from tests.reliability.held import Hold
from tests.reliability.processes import assert_same_state, curve
from train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from train.loaders import EpochLoaders
from train.schedule import ScheduleConfig, size_of_epoch

pytestmark = pytest.mark.distributed

NUM_IMAGES, BATCH = 48, 16
STEPS_PER_EPOCH, STEPS = 3, 9
SIDES = (16, 24, 32)  # of the epochs
SIZES = "--schedule.sizes=[[0,16],[1,24],[2,32]]"
OPTIONS = (SIZES, "--augment.size=32", "--train.checkpoint_every=1", "--train.keep_checkpoints=100")
SCHEDULE = ScheduleConfig(sizes=((0, 16), (1, 24), (2, 32)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Has `set.beton`, and the folder `images` that it was made of."""
    return make_beton(tmp_path_factory.mktemp("data"), [(40, 36)] * NUM_IMAGES).path.parent


def data_of(images, loader):
    return images / ("images" if loader == "folder" else "set.beton")


def maker(images, loader):
    """Builds the loader of views of a side, as a run does."""
    config = DataConfig(path=str(data_of(images, loader)), loader=loader, global_batch_size=BATCH)
    data = open_data(config)

    def make(side):
        return build_loader(
            config,
            data,
            build_recipe(dataclasses.replace(AugmentConfig(size=32), size=side)),
            seed=5,
            rank=0,
            world_size=1,
            device=torch.device("cpu"),
            dtype=torch.float32,
            num_cores=0 if loader == "folder" else 2,  # whose processes take seconds to start
        )

    return make


def growing(make):
    return EpochLoaders(make, lambda epoch: size_of_epoch(SCHEDULE, epoch, 32), len(SIDES))


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.epoch == b.epoch
        assert torch.equal(a.sample_indices, b.sample_indices)
        assert torch.equal(a.labels, b.labels)
        for ours_view, theirs_view in zip(a.views, b.views, strict=True):
            assert torch.equal(ours_view, theirs_view)


@pytest.mark.parametrize("loader", ["ffcv", "resident", "folder"])
def test_an_epochs_views_are_those_of_a_run_that_always_had_its_side(images, loader):
    make = maker(images, loader)
    with closing(growing(make)) as loaders:
        ours = [list(loaders.of(epoch).epoch(epoch)) for epoch in range(len(SIDES))]
    for epoch, side in enumerate(SIDES):
        assert {view.shape for batch in ours[epoch] for view in batch.views} == {(BATCH, 3, side, side)}
        with closing(make(side)) as fixed:
            assert_same_batches(ours[epoch], list(fixed.epoch(epoch)))


def test_a_state_of_any_phase_is_gone_on_from(images):
    make = maker(images, "ffcv")
    states = []
    with closing(growing(make)) as loaders:
        whole = []
        for epoch in range(len(SIDES)):
            for batch in loaders.of(epoch).epoch(epoch):
                whole.append(batch)
                states.append(loaders.state_dict())
    for done, state in enumerate(states[:-1], start=1):
        with closing(growing(make)) as loaders:
            first, start = loaders.load_state_dict(state)
            rest = []
            for epoch in range(first, len(SIDES)):
                rest += loaders.of(epoch).epoch(epoch, start if epoch == first else 0)
        assert_same_batches(rest, whole[done:])


def last_step(run_dir):
    return max((load_checkpoint(path).position["step"] for path in list_checkpoints(run_dir)), default=0)


def killed_run(runs_dir, data, *options, beyond):
    """Kill the run once it has a checkpoint beyond a step; what was saved after that step never was."""
    with Run(runs_dir, data, *options, world_size=1, hold=Hold(runs_dir, beyond + 1)) as run:
        run.wait_for(lambda: checkpoint_path(run.run_dir, beyond).exists())
        run.ranks[0].kill()
        assert run.end() == [KILLED]
    for path in list_checkpoints(run.run_dir):
        if path > checkpoint_path(run.run_dir, beyond):
            path.unlink()
    assert last_step(run.run_dir) == beyond


def finished_run(runs_dir, data, *options):
    with Run(runs_dir, data, *options, world_size=1) as run:
        run.assert_done()
    return run


@pytest.mark.parametrize(
    ("loader", "kills"),
    [
        pytest.param("ffcv", (2, 5, 8), id="ffcv"),
        pytest.param("resident", (5,), id="resident"),
        pytest.param("folder", (2, 5, 8), id="folder", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_in_each_phase_equals_the_one_that_is_not(images, tmp_path, loader, kills):
    data, options = data_of(images, loader), (*OPTIONS, f"--data.loader={loader}", "--data.num_threads=1")
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    whole_dir = finished_run(whole, data, *options).run_dir
    for step in kills:
        killed_run(again, data, *options, beyond=step)
    run_dir = finished_run(again, data, *options).run_dir
    assert [line["step"] for line in curve(run_dir)] == list(range(1, STEPS + 1))
    assert curve(run_dir) == curve(whole_dir)
    ours, theirs = (load_checkpoint(checkpoint_path(folder, STEPS)) for folder in (run_dir, whole_dir))
    assert_same_state(ours, theirs)
    if loader == "ffcv":
        check_the_side_changes_with_the_epoch(whole_dir, tmp_path, data)


def check_the_side_changes_with_the_epoch(whole_dir, tmp_path, data):
    """Against a run whose views stay as small as they begin: the same first epoch, and not a step longer."""
    runs_dir = tmp_path / "small"
    runs_dir.mkdir()
    small = curve(finished_run(runs_dir, data, "--augment.size=16").run_dir)
    ours = curve(whole_dir)
    assert ours[:STEPS_PER_EPOCH] == small[:STEPS_PER_EPOCH]
    assert ours[STEPS_PER_EPOCH]["loss"] != small[STEPS_PER_EPOCH]["loss"]


def test_another_schedule_of_sides_is_another_run(images, tmp_path):
    """Caught before anything is allocated; and so is a schedule that the run does not go through."""
    data = data_of(images, "ffcv")
    for sizes, size, words in (
        ("[[0,16],[3,32]]", 32, "`schedule.sizes` must begin within the 3 epochs of the run, got epoch 3 for side 32"),
        ("[[0,16],[1,24]]", 32, "the last side of `schedule.sizes` must be `augment.size`, 32, got 24"),
    ):
        with Run(tmp_path, data, f"--schedule.sizes={sizes}", f"--augment.size={size}", world_size=1) as run:
            assert run.end() == [2]
            (error,) = run.errors()
            assert error.startswith(f"error: {words}")
        assert not Path(tmp_path, "run").exists()
