"""Real runs with everything that watches the encoder, against one with nothing of it."""

import shutil

import pytest
import torch

from tests.pipelines.betons import make_beton
from tests.train.runs import finish, pretrain, start
from train.checkpoint import list_checkpoints, load_checkpoint
from train.evaluation.knn_protocol import KNNConfig, run_knn
from train.metrics import read_metrics

STEPS_PER_EPOCH, EPOCHS, K = 4, 3, 3
CLOCKS = {"images_per_sec", "data_wait"}
PROBE, COLLAPSE = {"probe_loss", "probe_accuracy"}, {"representation_std", "projection_rank"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two labelled sets, a run `bare`, a run `watched`, and `resumed`: the latter's first epoch, gone on with."""
    root = tmp_path_factory.mktemp("online")
    for name, count, encode in (("train", 16 * STEPS_PER_EPOCH, "raw"), ("test", 30, "jpeg")):
        beton = make_beton(root / name, [(24, 20)] * count, encode=encode, num_classes=4)
    content, begin = beton.path.read_bytes(), int(beton.offsets[7])
    (root / "broken.beton").write_bytes(content[:begin] + bytes(100) + content[begin + 100 :])
    common = ["--train.micro_batch_size=8", "--train.keep_checkpoints=9"]
    watching = [
        *common,
        "--online.linear_probe=true",
        "--online.knn_every_epochs=1",
        f"--online.test_data={root}/test/set.beton",
        f"--online.knn_neighbours={K}",
    ]
    data = root / "train/set.beton"
    bad = f"--online.test_data={root}/broken.beton"
    all_three = [
        start(pretrain(root, data, *common, "--online.watch_collapse=false", name="bare")),
        start(pretrain(root, data, *watching, name="watched")),
        start(pretrain(root, data, *watching, bad, name="cut")),
    ]
    assert [finish(process)[0] for process in all_three] == [0, 0, 2]
    shutil.copytree(root / "watched", root / "resumed")
    for path in list_checkpoints(root / "resumed")[1:]:
        path.unlink()
    # In the run directory stands the name of the run that it was copied from.
    config = root / "resumed/config.yaml"
    config.write_text(config.read_text().replace("name: watched", "name: resumed"))
    code, _, err = finish(start(pretrain(root, data, *watching, name="resumed")))
    assert code == 0, err
    return root


def lines(root, name):
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(root / name)]


def last(root, name):
    return load_checkpoint(list_checkpoints(root / name)[-1])


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_watches_changes_nothing(root):
    """Weights, running statistics, momentum and curve, bit for bit."""
    bare, watched = last(root, "bare"), last(root, "watched")
    assert_same(watched.model, bare.model)
    assert watched.optimizer.keys() == bare.optimizer.keys()
    for name, slots in watched.optimizer.items():
        assert_same(slots, bare.optimizer[name])
    assert watched.loader == bare.loader
    assert bare.probe == {}
    curve = lines(root, "watched")
    columns = curve[0].keys() - lines(root, "bare")[0].keys()
    assert columns == PROBE | COLLAPSE
    columns |= {"knn_accuracy"}
    assert [{k: v for k, v in line.items() if k not in columns} for line in curve] == lines(root, "bare")


def test_a_resumed_run_goes_on_with_the_same_probe(root):
    watched, resumed = last(root, "watched"), last(root, "resumed")
    assert_same(resumed.probe, watched.probe)
    assert all(value.any() for value in watched.probe.values())
    assert lines(root, "resumed") == lines(root, "watched")


def test_a_measurement_that_fails_loses_no_step_and_is_made_up_for(root):
    (path,) = list_checkpoints(root / "cut")
    assert load_checkpoint(path).position["step"] == STEPS_PER_EPOCH
    assert [line["step"] for line in lines(root, "cut")] == list(range(1, STEPS_PER_EPOCH))  # its last is not complete
    data, good = root / "train/set.beton", f"--online.test_data={root}/test/set.beton"
    watching = [f"--online.{option}" for option in ("linear_probe=true", "knn_every_epochs=1", f"knn_neighbours={K}")]
    options = ["--train.micro_batch_size=8", "--train.keep_checkpoints=9", *watching, good]
    code, _, err = finish(start(pretrain(root, data, *options, name="cut")))
    assert code == 0, err
    assert lines(root, "cut") == lines(root, "watched")
    ours, theirs = last(root, "cut"), last(root, "watched")
    assert_same(ours.model, theirs.model)
    assert ours.position == theirs.position


def test_neighbours_are_measured_at_the_end_of_an_epoch_as_the_evaluation_does(root):
    measured = {line["step"]: line["knn_accuracy"] for line in lines(root, "watched") if "knn_accuracy" in line}
    assert list(measured) == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    config = KNNConfig(
        checkpoint=str(root / "watched"),
        train_data=str(root / "train/set.beton"),
        test_data=str(root / "test/set.beton"),
        k=(K,),
        temperature=(0.07,),
        output_dir=str(root / "evaluation"),
        device="cpu",
    )
    assert run_knn(config).figures["all"][0].top1 == measured[STEPS_PER_EPOCH * EPOCHS]
