"""Whole runs of the script: what changes the machine, and not the run, changes the loss curve by rounding alone."""

import pytest
import torch

from tests.pipelines.betons import make_beton
from tests.train.runs import BIN, finish, pretrain, start
from train.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from train.metrics import read_metrics
from train.runtime import free_port

pytestmark = pytest.mark.distributed

NUM_IMAGES = 320
STEPS = 20  # 4 epochs of 5 batches of 64
# Rounding grows with every step: so small a network, at the published rate of 0.3, turns 1e-6 into 1e-2 within twenty.
OPTIONS = ("--train.epochs=4", "--data.global_batch_size=64", "--model.encoder.width=0.5", "--optim.base_lr=0.03")
SAME = 1e-4  # of a loss of 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("data"), [(24, 20)] * NUM_IMAGES, encode="raw").path


def run_of(runs_dir, data, name, num_ranks, *options):
    launcher = (BIN / "torchrun", f"--nproc_per_node={num_ranks}", f"--master_port={free_port()}")
    return start(pretrain(runs_dir, data, *OPTIONS, *options, name=name, launcher=launcher))


def finish_all(processes):
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"


def losses(runs_dir, name):
    return [line["loss"] for line in read_metrics(runs_dir / name)]


def forget_after(step, run_dir):
    """As if the run had been killed after a step of which there is a checkpoint."""
    for path in list_checkpoints(run_dir):
        if load_checkpoint(path).position["step"] > step:
            path.unlink()
    assert load_checkpoint(latest_checkpoint(run_dir)).position["step"] == step


def test_ranks_stages_and_exchange_change_the_curve_by_rounding_alone(data, tmp_path):
    """The same run in one process, on 2 and on 4 ranks; with its state shared out; with projections in a ring."""
    runs_dir = tmp_path
    wrong = run_of(runs_dir, data, "wrong", 1, "--optim.trust_coefficient=0.002")
    finish_all([run_of(runs_dir, data, "one", 1), run_of(runs_dir, data, "two", 2, "--train.zero_stage=1"), wrong])
    saving = ("--train.checkpoint_every=7", "--train.keep_checkpoints=9")
    finish_all([run_of(runs_dir, data, "four", 4, "--train.zero_stage=2", *saving)])
    finish_all([run_of(runs_dir, data, "four_zero0", 4, "--model.exchange=ring")])
    for name in ("two", "four", "four_zero0"):
        check_the_run_is_the_same(runs_dir, name)
    check_a_wrong_trust_ratio_would_show(runs_dir)
    check_a_run_goes_on_at_another_stage_and_number_of_ranks(runs_dir, data)


def check_the_run_is_the_same(runs_dir, name):
    assert len(losses(runs_dir, name)) == STEPS
    assert losses(runs_dir, name) == pytest.approx(losses(runs_dir, "one"), abs=SAME)
    one, other = (load_checkpoint(latest_checkpoint(runs_dir / name)) for name in ("one", name))
    assert relative_distance(other.model, one.model) < 1e-3
    assert relative_distance(momentum(other), momentum(one)) < 1e-2


def momentum(checkpoint):
    return {name: slots["momentum"] for name, slots in checkpoint.optimizer.items()}


def relative_distance(ours, theirs):
    """‖ours − theirs‖ / ‖theirs‖ of all tensors together."""
    assert ours.keys() == theirs.keys()
    flat, expected = (torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs))
    return ((flat - expected).norm() / expected.norm()).item()


def check_a_wrong_trust_ratio_would_show(runs_dir):
    pairs = zip(losses(runs_dir, "wrong"), losses(runs_dir, "one"), strict=True)
    assert max(abs(wrong - one) for wrong, one in pairs) > 10 * SAME


def check_a_run_goes_on_at_another_stage_and_number_of_ranks(runs_dir, data):
    """From the middle of an epoch of four ranks under ZeRO 2 to two ranks that keep all of the state each."""
    whole = losses(runs_dir, "four")
    forget_after(14, runs_dir / "four")
    options = ("--train.zero_stage=0", "--train.checkpoint_every=7", "--train.keep_checkpoints=9")
    finish_all([run_of(runs_dir, data, "four", 2, *options)])
    assert losses(runs_dir, "four") == pytest.approx(whole, abs=SAME)


def test_micro_batches_train_and_resume_bit_for_bit(data, tmp_path):
    """Their curve is their own, for batch norm; but an interrupted run is the run that was not."""
    options = ("--train.micro_batch_size=16", "--train.checkpoint_every=3", "--train.keep_checkpoints=100")
    finish_all([run_of(tmp_path, data, "run", 2, *options)])
    whole = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    curve = losses(tmp_path, "run")
    assert len(curve) == STEPS
    forget_after(12, tmp_path / "run")
    finish_all([run_of(tmp_path, data, "run", 2, *options)])
    resumed = load_checkpoint(latest_checkpoint(tmp_path / "run"))
    assert losses(tmp_path, "run") == curve
    assert all(torch.equal(resumed.model[name], value) for name, value in whole.model.items())


def test_batch_norm_over_other_numbers_of_images_is_not_the_same_run(data, tmp_path):
    options = ("--train.micro_batch_size=16", "--train.epochs=2")
    finish_all([run_of(tmp_path, data, "run", 2, *options)])
    code, _, err = finish(run_of(tmp_path, data, "run", 1, *options))
    assert code != 0
    assert "was trained with batch norm over 32 images, which `train.micro_batch_size` and" in err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--train.micro_batch_size=5",
            "`train.micro_batch_size` must divide a rank's share of the batch, 32 images, got 5; use 4 or 8",
        ),
        ("--model.norm_group_size=3", "`model.norm_group_size` must divide the world size 2, got 3; use 2"),
    ],
)
def test_what_the_ranks_cannot_share_is_refused(data, tmp_path, option, message):
    code, _, err = finish(run_of(tmp_path, data, "run", 2, option))
    assert code != 0
    assert message in err
    assert not (tmp_path / "run").exists()
