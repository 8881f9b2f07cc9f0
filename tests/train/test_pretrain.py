"""The scripts as a user starts them: launchers, kill and resume, bad input."""

import signal
import sys

import pytest
import torch
import yaml

from tests.pipelines.betons import make_beton
from tests.reliability.held import SCRIPT, Hold
from tests.reliability.processes import wait_for
from tests.train.runs import BIN, deepspeed, finish, pretrain, start
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.metrics import read_metrics
from train.runtime import free_port

NUM_IMAGES = 80
STEPS_PER_EPOCH = 5  # batches of 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("data"), [(24, 20)] * NUM_IMAGES, encode="raw").path


@pytest.fixture
def port():
    return free_port()


def final_state(runs_dir, name="run"):
    return load_checkpoint(latest_checkpoint(runs_dir / name))


def curve(runs_dir, name="run"):
    """What training did: every metric but the clock's."""
    return [
        {key: value for key, value in line.items() if key not in ("images_per_sec", "data_wait")}
        for line in read_metrics(runs_dir / name)
    ]


def assert_same_state(ours, theirs):
    assert ours.model.keys() == theirs.model.keys()
    for key, value in ours.model.items():
        assert torch.equal(value, theirs.model[key]), key
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    for key, slots in ours.optimizer.items():
        assert torch.equal(slots["momentum"], theirs.optimizer[key]["momentum"]), key


def assert_done(process):
    code, out, err = finish(process)
    assert code == 0, f"{out[-2000:]}\n{err[-4000:]}"


def test_plain_python_trains_and_leaves_a_run_directory(data, tmp_path):
    assert_done(start(pretrain(tmp_path, data)))
    run_dir = tmp_path / "run"
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    assert {"config.yaml", "metrics.jsonl", "train.log", "checkpoints"} <= {p.name for p in run_dir.iterdir()}
    assert list(run_dir.glob("events.*"))
    log = (run_dir / "train.log").read_text()
    assert "simclr on 1 ranks of 16 images in 1 micro-batches; fp32; ZeRO 0; loss nt_xent, all_gather" in log
    assert "LARS: backend fused" in log
    assert "NT-Xent backend: fused" in log
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["model"]["encoder"] == {
        "depth": 10,
        "width": 0.125,
        "stem": "cifar",
        "selective_kernel": False,
    }
    assert config["optim"]["momentum"] == 0.9  # defaults are written out
    last = read_metrics(run_dir)[-1]
    assert last["images_per_sec"] > 0
    assert 0 <= last["data_wait"] <= 1
    # The same command again: the run is complete, and nothing changes.
    before = final_state(tmp_path)
    assert_done(start(pretrain(tmp_path, data)))
    assert_same_state(final_state(tmp_path), before)


@pytest.mark.distributed
def test_the_number_of_ranks_changes_the_loss_curve_by_rounding_alone(data, tmp_path, port):
    torchrun = (BIN / "torchrun", "--nproc_per_node=2", f"--master_port={port}")
    processes = [
        start(pretrain(tmp_path, data, name="one")),
        start(pretrain(tmp_path, data, name="two", launcher=torchrun)),
    ]
    for process in processes:
        assert_done(process)
    for ours, theirs in zip(curve(tmp_path, "two"), curve(tmp_path, "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["lr"] == theirs["lr"]
    one, two = final_state(tmp_path, "one"), final_state(tmp_path, "two")
    for key, value in one.model.items():
        torch.testing.assert_close(two.model[key], value, rtol=1e-3, atol=1e-4)


def torn(data, folder):
    path = folder / "torn.beton"
    path.write_bytes(data.read_bytes()[:5000])
    return path


def foreign(data, folder):
    path = folder / "foreign.beton"
    path.write_bytes(b"PK\x03\x04" + bytes(4000))
    return path


def missing(data, folder):
    return folder / "missing.beton"


@pytest.mark.parametrize(
    ("make_path", "overrides", "message"),
    [
        (missing, [], "missing.beton"),
        (foreign, [], "foreign.beton"),
        (torn, [], "torn.beton"),
        (None, ["--optim.bas_lr=1"], "there is no option `optim.bas_lr`; did you mean `optim.base_lr`?"),
        (None, ["--model.encoder.depth=20"], "`model.encoder.depth` must be one of 10, 18, 34, 50, 101, 152, got 20"),
        (None, ["--data.global_batch_size=500"], "`data.global_batch_size` must not exceed the 80 images"),
        (None, ["--train.device=cuda"], "torch sees 0 GPUs"),
        (None, ["--schedule.warmup_epochs=2.95"], "`schedule.warmup_epochs` must be shorter than the run of 15 steps"),
        (None, ["--augment.recipe=supervised"], "`augment.recipe` must draw the 2 views"),
        (None, ["--config=nowhere.yaml"], "nowhere.yaml"),
        (
            lambda data, folder: folder,
            [],
            "is a folder; convert it with `python -m tools.convert`, or set `data.loader`",
        ),
        (None, ["--data.loader=resident", "--data.geometry=device"], "`data.geometry` device needs `data.loader` ffcv"),
        (None, ["--augment.size=60000"], "GB are free; use a smaller `data.global_batch_size`, fewer or smaller views"),
    ],
)
def test_bad_input_gets_one_line_and_code_2_and_nothing_is_written(data, tmp_path, make_path, overrides, message):
    path = make_path(data, tmp_path) if make_path else data
    code, _, err = finish(start(pretrain(tmp_path / "runs", path, *overrides)))
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_the_ranks_cannot_share_names_the_nearest_sizes(data, tmp_path, port):
    launcher = (BIN / "torchrun", "--nproc_per_node=3", f"--master_port={port}")
    code, _, err = finish(start(pretrain(tmp_path / "runs", data, launcher=launcher)))
    assert code != 0
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told == ["error: `data.global_batch_size` must be divisible by world size 3, got 16; use 15 or 18"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.distributed
def test_the_deepspeed_launcher_passes_code_2_on(data, tmp_path, port):
    code, out, err = finish(
        start(pretrain(tmp_path / "runs", data, "--data.global_batch_size=15", launcher=deepspeed(port)))
    )
    assert code == 2, out + err
    assert "must be divisible by world size 2, got 15; use 14 or 16" in err


def test_a_fault_of_one_rank_alone_is_told(data, tmp_path):
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    code, _, err = finish(start(pretrain(tmp_path / "runs", data, "--train.device=cuda"), extra_environment=alone))
    assert code == 2
    assert "error: rank 1: device cuda was asked for and rank 1 needs GPU number 1, but torch sees 0 GPUs" in err


def test_ctrl_c_ends_with_code_130_and_the_run_can_go_on(data, tmp_path):
    options, hold = ("--train.epochs=4", "--train.checkpoint_every=2"), Hold(tmp_path, 7)
    process = start(pretrain(tmp_path, data, *options, launcher=(sys.executable, SCRIPT)), hold.variables)
    wait_for(lambda: hold.reached(7), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    assert final_state(tmp_path).position["step"] == 7
    assert_done(start(pretrain(tmp_path, data, *options)))
    assert read_metrics(tmp_path / "run")[-1]["step"] == 4 * STEPS_PER_EPOCH


def test_a_run_directory_belongs_to_one_configuration(data, tmp_path):
    run_dir = tmp_path / "run"
    assert_done(start(pretrain(tmp_path, data, "--train.epochs=2")))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    code, _, err = finish(start(pretrain(tmp_path, data, "--train.epochs=2", "--optim.base_lr=0.5")))
    assert code == 2
    assert err.splitlines() == [
        f"error: `optim.base_lr` is 0.3 in {run_dir}/config.yaml and 0.5 in this run; "
        f"choose another `name`, or remove {run_dir} to start over"
    ]
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_of_a_version_without_an_option_goes_on(data, tmp_path):
    """Its default is what that version did."""
    assert_done(start(pretrain(tmp_path, data, "--train.epochs=2")))
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["optim"]["form"], config["model"]["encoder"]["selective_kernel"]
    path.write_text(yaml.safe_dump(config))
    assert_done(start(pretrain(tmp_path, data, "--train.epochs=2")))
    code, _, err = finish(start(pretrain(tmp_path, data, "--train.epochs=2", "--optim.form=larc")))
    assert code == 2
    assert "`optim.form` is classic in" in err
    config["model"]["of_a_later_version"] = 1
    path.write_text(yaml.safe_dump(config))
    code, _, err = finish(start(pretrain(tmp_path, data, "--train.epochs=2")))
    assert code == 2
    assert "was written by another version of Twinview" in err


def test_a_diverged_run_says_so(data, tmp_path):
    overrides = ["--optim.base_lr=1e30", "--optim.trust_coefficient=1e30", "--schedule.warmup_epochs=0"]
    code, _, err = finish(start(pretrain(tmp_path, data, *overrides)))
    assert code == 1
    assert "is not finite: rank 0 had NaN in the projections. The optimizer has not moved since" in err
