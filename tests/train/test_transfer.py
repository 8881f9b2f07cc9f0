"""Transfer: the grid of the paper, which setting is chosen and on what, and a grid that goes on where it stood."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.build import DataConfig
from tests.pipelines.betons import make_beton
from tests.train.evaluated import CONFIG, make_sets, save_run
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import TrainConfig
from train.evaluation import transfer_grid
from train.evaluation.labelled_run import open_source
from train.evaluation.logistic_protocol import LogisticConfig, run_logistic
from train.evaluation.protocol import EvaluationConfig
from train.evaluation.transfer import TransferConfig, grid_of, run_transfer, training_of
from train.evaluation.transfer_grid import Setting, best_of, split_of

RUN = replace(
    CONFIG,
    data=DataConfig(path="set.beton", num_threads=1),
    train=TrainConfig(device="cpu", precision="fp32", cpu_threads=1, log_every=1),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny pretrained run in `run/` beside a folder `pets/` with two labelled sets."""
    root = tmp_path_factory.mktemp("transferred")
    make_sets(root / "pets")
    save_run(root / "run", config=RUN)
    return root


def asked(root, output_dir, **changes):
    data = {name: str(root / "pets" / name.split("_")[0] / "set.beton") for name in ("train_data", "test_data")}
    options = {
        "checkpoint": str(root / "run"),
        "mode": "finetune",
        "global_batch_size": 16,
        "steps": 4,
        "batch_size": 9,
    }
    return TransferConfig(**data | options | {"output_dir": str(output_dir)} | changes)


def default(**changes):
    return TransferConfig(checkpoint="c", train_data="cars/train.beton", test_data="b", mode="finetune", **changes)


def test_the_grid_is_the_papers():
    settings = grid_of(default())
    assert len(settings) == len(set(settings)) == len({setting.name for setting in settings}) == 56
    rates = sorted({setting.learning_rate for setting in settings})
    assert rates == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1])
    decays = sorted({setting.weight_decay for setting in settings})
    assert decays == pytest.approx([0, 1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3])
    random = grid_of(default(representation="random"))
    assert len(random) == 56
    ends = [value for setting in (random[0], random[-1]) for value in vars(setting).values()]
    assert ends == pytest.approx([1e-3, 1e-5, 1.0, 10**-1.5])


def test_a_setting_trains_as_in_the_paper():
    trained = training_of(default(), Setting(learning_rate=0.01, weight_decay=1e-4), num_images=50_000)
    assert (trained.optim.name, trained.optim.nesterov, trained.optim.momentum) == ("sgd", True, 0.9)
    assert trained.optim.base_lr == 0.01
    assert trained.optim.weight_decay == pytest.approx(0.01)  # "divided by the learning rate"
    assert trained.epochs == round(20_000 / 195)
    random = training_of(default(representation="random"), Setting(learning_rate=0.01, weight_decay=0.0), 50_000)
    assert random.epochs == round(40_000 / 195)
    assert training_of(default(steps=1), Setting(learning_rate=1.0, weight_decay=0.0), 50_000).epochs == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sets/cars/train.beton", "cars"),
        ("sets/cars.beton", "cars"),
        ("sets/cars/train", "cars"),
        ("sets/cars/images/set.beton", "cars"),
    ],
)
def test_a_set_is_named_by_its_path(path, name):
    assert replace(default(), train_data=path).dataset_name == name


def test_the_validation_split_is_what_training_leaves(root, tmp_path):
    source = open_source(asked(root, tmp_path))
    subset, held_out = split_of(source, 0.25, seed=3)
    rows = transfer_grid.chosen_rows(source, subset)
    assert sorted([*rows.tolist(), *held_out.tolist()]) == list(range(64))
    assert np.bincount(source.train.labels[held_out]).tolist() == [4, 4, 4, 4]
    assert split_of(source, 0.25, seed=4)[1].tolist() != held_out.tolist()


def test_the_best_setting_is_the_first_of_the_highest():
    settings = [Setting(learning_rate=rate, weight_decay=0.0) for rate in (0.1, 0.2, 0.3, 0.4)]
    tried = [{"top1": t, "mean_per_class": m} for t, m in ((0.5, 0.9), (0.7, 0.2), (None, None), (0.7, 0.3))]
    assert best_of(settings, tried, "top1") == settings[1]
    assert best_of(settings, tried, "mean_per_class") == settings[0]
    with pytest.raises(RuntimeError, match="every setting of the grid diverged; try lower `learning_rates`"):
        best_of(settings[2:3], tried[2:3], "top1")


def test_a_grid_goes_on_with_the_cells_that_are_missing(root, tmp_path, monkeypatch):
    config = asked(root, tmp_path, learning_rates=(0.05, 1e12, 0.5), weight_decays=(0.0,))
    result = run_transfer(config)
    folder = tmp_path / "transfer-pets-learned-seed0"
    assert [tried["learning_rate"] for tried in result.tried] == [0.05, 1e12, 0.5]
    assert result.tried[1]["top1"] is None  # it diverged
    assert "is not finite" in result.tried[1]["failed"]
    others = [tried["top1"] for tried in result.tried if tried["top1"] is not None]
    chosen = next(tried for tried in result.tried if tried["top1"] == max(others))
    assert result.chosen == {"learning_rate": chosen["learning_rate"], "weight_decay": 0.0}
    assert result.chosen_by == "top1 on a validation split, 8 of the 64 training images"
    assert not list(folder.glob("lr*/checkpoints"))
    (final,) = map(Path, result.details["runs"])
    assert "fraction: 0.9" in (folder / "lr0.05-wd0" / "config.yaml").read_text()
    weights = load_checkpoint(latest_checkpoint(final))
    assert weights.loader["subset"] is None  # all of the training set
    assert (weights.position["step"], result.details["steps"]) == (4, 4)

    trained = []
    train = transfer_grid.train
    monkeypatch.setattr(transfer_grid, "train", lambda run, i: trained.append(run.name) or train(run, i))
    shutil.rmtree(folder / "lr0.5-wd0")
    again = run_transfer(config)
    assert trained == ["lr0.5-wd0"]
    assert [tried["top1"] for tried in again.tried] == [tried["top1"] for tried in result.tried]
    assert again.figures == result.figures

    kept = folder / "lr0.05-wd0" / "validation.json"
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps(content | {"identity": {}}))
    with pytest.raises(ValueError, match=r"was measured on other images .*; remove .*lr0.05-wd0 to train it again"):
        run_transfer(config)
    kept.write_text("{")
    with pytest.raises(ValueError, match=r"validation.json is damaged; remove .* to train it again"):
        run_transfer(config)
    kept.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"`train.epochs` is 1 .* and 2 in this run"):
        run_transfer(replace(config, steps=7))


def test_random_weights_are_not_the_checkpoints(root, tmp_path):
    options = {"learning_rates": (1e-9,), "weight_decays": (0.0,), "representation": "random"}
    result = run_transfer(asked(root, tmp_path, **options))
    assert (result.chosen_by, result.tried, result.details["starts_from"]) == ("given in advance", [], "random weights")
    theirs = load_checkpoint(latest_checkpoint(root / "run")).model["encoder.conv1.weight"]
    ours = load_checkpoint(latest_checkpoint(Path(result.details["runs"][0]))).model["encoder.conv1.weight"]
    assert not torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow  # the processes that decode a folder take seconds to start
def test_a_folder_of_class_folders_is_trained_on(root, tmp_path):
    options = {"learning_rates": (0.01,), "weight_decays": (0.0,), "steps": 1, "dataset": "ours"}
    data = {name: str(root / "pets" / name.split("_")[0] / "images") for name in ("train_data", "test_data")}
    result = run_transfer(asked(root, tmp_path, **options | data))
    assert result.figures["all"][0].num_samples == 24
    assert result.suffix == "finetune-ours"


def test_a_class_with_one_sample_cannot_be_split(root, tmp_path):
    make_beton(tmp_path, [(24, 20)] * 7, encode="raw", num_classes=4)
    config = asked(root, tmp_path / "out", train_data=str(tmp_path / "set.beton"))
    with pytest.raises(ValueError, match=r"at least 2 samples of each class, .*set.beton has 1 of class 3 \(class3\)"):
        run_transfer(config)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_the_images_cannot_fill_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="must not exceed the 56 labelled images, got 57; use 56 or less"):
        run_transfer(asked(root, tmp_path / "out", global_batch_size=57))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "both"},
        {"select_by": "top2"},
        {"learning_rates": ()},
        {"learning_rates": (0.0,)},
        {"weight_decays": (-1.0,)},
        {"weight_decays": (0.1, 0.1)},
        {"steps": 0},
        {"validation_fraction": 1.0},
        {"global_batch_size": 0},
        {"dataset": "a/b"},
        {"steps": 100, "mode": "linear"},
    ],
)
def test_options_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=f"`{next(iter(change))}` must"):
        TransferConfig(**{"checkpoint": "c", "train_data": "a", "test_data": "b", "mode": "finetune"} | change)


def test_the_linear_mode_is_the_logistic_protocol(root, tmp_path):
    common = {"head_layers": 1, "seed": 3, "validation_fraction": 0.2, "steps": None}
    config = asked(root, tmp_path, mode="linear", **common)
    names = [field.name for field in fields(EvaluationConfig)]
    logistic = LogisticConfig(**{name: getattr(config, name) for name in names}, val_fraction=0.2)
    ours, theirs = run_transfer(config), run_logistic(logistic)
    assert (ours.protocol, ours.suffix) == ("transfer", "linear-pets")
    assert (ours.figures, ours.chosen, list(ours.tried)) == (theirs.figures, theirs.chosen, list(theirs.tried))
