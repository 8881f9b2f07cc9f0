"""`train/evaluate.py` on a real run: what it prints and writes is what the protocols say of the encoder's features."""

import json
import sys

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from tests.pipelines.betons import make_beton
from tests.train.runs import finish, pretrain, start
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import config_from_dict
from train.evaluation.features import build_encoder, represent
from train.evaluation.linear_probe import linear_accuracy


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny run beside the two labelled sets that it is evaluated on."""
    root = tmp_path_factory.mktemp("evaluated")
    for name, count in (("train", 64), ("test", 24)):
        (root / name).mkdir()
        make_beton(root / name, [(24, 20)] * count, encode="raw", num_classes=4)
    code, _, err = finish(start(pretrain(root, root / "train" / "set.beton", "--train.epochs=2")))
    assert code == 0, err
    return root / "run"


def evaluate(run_dir, protocol, *options):
    root = run_dir.parent
    command = [
        sys.executable,
        "train/evaluate.py",
        protocol,
        f"--checkpoint={run_dir}",
        f"--train_data={root}/train/set.beton",
        f"--test_data={root}/test/set.beton",
        *options,
    ]
    return finish(start(command))


def features(run_dir, representation, split):
    checkpoint = load_checkpoint(latest_checkpoint(run_dir))
    return represent(
        build_encoder(representation, checkpoint),
        run_dir.parent / split / "set.beton",
        config_from_dict(checkpoint.config),
        device=torch.device("cpu"),
        num_cores=1,
        batch_size=10,
    )


def test_knn_is_what_scikit_learn_finds(run_dir):
    code, out, err = evaluate(run_dir, "knn", "--k=1", "--labels_per_class=[2]", "--num_seeds=3")
    assert code == 0, err
    record = json.loads((run_dir / "evaluation" / "knn-learned.json").read_text())
    train, test = features(run_dir, "learned", "train"), features(run_dir, "learned", "test")
    judge = KNeighborsClassifier(1, metric="cosine").fit(train.values, train.labels)
    assert record["accuracy"]["all"] == {"mean": pytest.approx(judge.score(test.values, test.labels)), "std": 0.0}
    assert record["accuracy"]["2"]["std"] > 0
    assert f"{100 * record['accuracy']['all']['mean']:.1f} %" in out
    assert record["checkpoint"].endswith(".safetensors")


def test_linear_evaluates_pixels_and_the_random_network_too(run_dir):
    for representation in ("pixels", "random"):
        code, out, err = evaluate(run_dir, "linear", f"--representation={representation}")
        assert code == 0, err
        record = json.loads((run_dir / "evaluation" / f"linear-{representation}.json").read_text())
        train, test = (features(run_dir, representation, split) for split in ("train", "test"))
        expected = linear_accuracy(train.values, train.labels, test.values, test.labels)
        assert record["accuracy"] == {"all": {"mean": expected, "std": 0.0}}
        assert representation in out


def test_representations_are_what_they_say(run_dir):
    pixels = features(run_dir, "pixels", "test")
    assert pixels.values.shape == (24, 3 * 16 * 16)
    assert pixels.labels.tolist() == [i * 4 // 24 for i in range(24)]
    learned, random = features(run_dir, "learned", "test"), features(run_dir, "random", "test")
    assert learned.values.shape == random.values.shape == (24, 64)  # 512 channels · 0.125
    assert not torch.allclose(learned.values, random.values)
    again = features(run_dir, "learned", "test")
    assert torch.equal(learned.values, again.values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint=nowhere"], "there is no checkpoint nowhere"),
        (["--test_data=nowhere.beton"], "nowhere.beton"),
        (["--labels_per_class=[50]"], "labels per class must be between 1 and 16, the size of class 0, got 50"),
        (["--device=cuda"], "torch sees 0 GPUs"),
        (["--num_seeds=0"], "`num_seeds` must be at least 1, got 0"),
        (["--representation=best"], "`representation` must be one of"),
    ],
)
def test_bad_input_gets_one_line_and_code_2(run_dir, options, message):
    code, _, err = evaluate(run_dir, "knn", *options)
    assert code == 2, err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert message in err


def test_sets_of_other_classes_are_refused_by_the_first_that_differs(run_dir, tmp_path):
    make_beton(tmp_path, [(24, 20)] * 6, encode="raw", num_classes=3)
    code, _, err = evaluate(run_dir, "knn", f"--test_data={tmp_path}/set.beton")
    assert code == 2
    assert f"label 3 is None in {tmp_path}/set.beton and class3 in" in err
