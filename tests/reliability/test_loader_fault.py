"""A sample that one rank cannot decode, in the middle of a run: it stops by name, and goes on once that is mended."""

import shutil

import pytest

from pipelines.beton import open_beton
from pipelines.order import epoch_order, rank_rows
from tests.reliability.forked import Run
from tests.reliability.processes import curve
from tests.reliability.record import record
from tests.reliability.whole_run import (
    BATCH_SIZE,
    NUM_IMAGES,
    OPTIONS,
    STEPS,
    assert_as_uninterrupted,
    last_step,
    steps_told,
    whole_run,
)
from train.cli import EXIT_BAD_INPUT, EXIT_FAILED

pytestmark = pytest.mark.distributed

BAD_BATCH = 6  # of the first epoch, on rank 1
CHECKPOINT_EVERY = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory)


def damage(path, sample, folder):
    """A copy of the file in which one JPEG is cut off in the middle (its rest is zeros)."""
    beton, content = open_beton(path), bytearray(path.read_bytes())
    start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    (folder / path.name).write_bytes(content)
    shutil.copy(path.with_name(path.name + ".json"), folder)
    return folder / path.name


def test_a_loader_that_raises_stops_the_run_by_name_and_it_goes_on_once_mended(whole, tmp_path):
    data, whole_dir = whole
    rows = rank_rows(BAD_BATCH, BATCH_SIZE, NUM_IMAGES, rank=1, world_size=2)
    sample = int(epoch_order(0, 0, NUM_IMAGES)[rows][3])
    damaged = damage(data, sample, tmp_path)
    options = (*OPTIONS, f"--train.checkpoint_every={CHECKPOINT_EVERY}")
    with Run(tmp_path, damaged, *options) as run:
        codes = run.end()
    assert codes == [EXIT_FAILED, EXIT_BAD_INPUT]
    told = rf"sample {sample} (class{sample * 2 // NUM_IMAGES}/{sample:04d}.png) of {damaged} cannot be decoded: "
    first, second = run.errors()
    assert first.startswith(f"error: rank 1 stopped at step {BAD_BATCH}: {told}")
    assert second.startswith(f"error: rank 1: {told}")
    lost = steps_told(run.run_dir) - last_step(run.run_dir)
    assert (steps_told(run.run_dir), lost) == (BAD_BATCH, BAD_BATCH % CHECKPOINT_EVERY)
    assert_as_uninterrupted(run.run_dir, whole_dir)

    skipping = tmp_path / "skipping"
    shutil.copytree(run.run_dir, skipping / "run")
    with Run(skipping, damaged, *options, "--data.on_error=skip") as skipped:
        skipped.assert_done()
    ours, theirs = curve(skipped.run_dir), curve(whole_dir)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert ours[:BAD_BATCH] == theirs[:BAD_BATCH]
    assert ours[BAD_BATCH]["loss"] != theirs[BAD_BATCH]["loss"]
    assert f"sample {sample} " in (skipped.run_dir / "train.rank1.log").read_text()

    with Run(tmp_path, data, *options) as mended:
        mended.assert_done()
    assert last_step(run.run_dir) == STEPS
    assert_as_uninterrupted(run.run_dir, whole_dir)
    record(
        fault="a loader thread raises",
        done="a JPEG cut off in the middle of the set, met by one of two ranks; resumed with `data.on_error: skip`, "
        "and with the set mended",
        runs=3,
        lost_steps=f"{lost} (a checkpoint every {CHECKPOINT_EVERY} steps)",
        result="both ranks end and name the sample; mended, the end is the uninterrupted run's bit for bit",
    )
