"""The supervised baseline: what it takes from the run that it is compared with, and what it does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.build import build_method
from pipelines.augment import build_recipe
from pipelines.build import DataConfig
from pipelines.subset import SubsetConfig
from tests.train.evaluated import CONFIG, make_sets, save_run
from train.checkpoint import latest_checkpoint, load_checkpoint
from train.config import TrainConfig, config_from_dict
from train.evaluation.supervised import SupervisedConfig, run_supervised, stretched
from train.optim.lars import LARSConfig
from train.schedule import ScheduleConfig

RUN = replace(
    CONFIG,
    data=DataConfig(path="set.beton", num_threads=1, global_batch_size=32),
    train=TrainConfig(device="cpu", precision="fp32", cpu_threads=1, log_every=1, epochs=3),
    optim=LARSConfig(base_lr=0.7, lr_scaling="sqrt", weight_decay=1e-5),
    schedule=ScheduleConfig(warmup_epochs=1.0),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared")
    make_sets(root)
    save_run(root / "run", config=RUN)
    return root


def asked(root, output_dir, **changes):
    data = {name: str(root / name.split("_")[0] / "set.beton") for name in ("train_data", "test_data")}
    return SupervisedConfig(**data | {"checkpoint": str(root / "run"), "output_dir": str(output_dir)} | changes)


def trained(result):
    checkpoint = load_checkpoint(latest_checkpoint(Path(result.details["runs"][0])))
    return checkpoint, config_from_dict(checkpoint.config)


def test_it_is_the_same_network_loader_batch_and_epochs(root, tmp_path):
    result = run_supervised(asked(root, tmp_path))
    checkpoint, config = trained(result)
    assert (config.model.method, config.model.encoder) == ("supervised", RUN.model.encoder)
    assert (config.data.global_batch_size, config.data.loader, config.train.epochs) == (32, "ffcv", 3)
    assert (config.schedule, config.train.initial_encoder) == (RUN.schedule, None)
    assert (config.optim.name, config.optim.base_lr, config.optim.nesterov) == ("sgd", 0.1, True)
    assert config.optim.weight_decay == 1e-4
    assert checkpoint.position["step"] == 6
    assert result.figures["all"][0].num_samples == 24
    assert (result.suffix, result.details["starts_from"]) == ("all", "random weights")


def test_it_starts_from_weights_of_the_seed(root, tmp_path):
    checkpoint, config = trained(run_supervised(asked(root, tmp_path, seed=11, base_lr=0.0, epochs=2)))
    method = build_method(config.model, 11)
    for name, parameter in method.named_parameters():
        assert torch.equal(checkpoint.model[name], parameter)


def test_simclrs_augmentation_and_the_runs_optimizer_can_be_taken(root, tmp_path):
    result = run_supervised(asked(root, tmp_path, augment="supervised_color", optimizer="run", epochs=2))
    config = trained(result)[1]
    assert config.optim == RUN.optim
    (view,) = build_recipe(config.augment).views
    assert view == build_recipe(RUN.augment).views[0]
    assert (view.jitter_prob, view.gray_prob, view.blur_prob) == (0.8, 0.2, 0.5)
    assert result.suffix == "all-supervised_color-run-epochs2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representation": "learned"}, "`representation` must be random for the baseline, got learned"),
        ({"optimizer": "adam"}, "`optimizer` must be one of sgd, run"),
        ({"epochs": 0}, "`epochs` must be at least 1"),
    ],
)
def test_what_makes_no_baseline_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SupervisedConfig(**{"checkpoint": "c", "train_data": "a", "test_data": "b"} | change)


def test_a_batch_of_the_run_must_fit_the_labels(root, tmp_path):
    with pytest.raises(ValueError, match="`global_batch_size` must not exceed the 24 labelled images, got 32"):
        run_supervised(asked(root, tmp_path / "out", labels=SubsetConfig(per_class=6)))
    assert not (tmp_path / "out").exists()


def test_a_schedule_is_stretched_with_the_epochs():
    schedule = ScheduleConfig(warmup_epochs=10.0, sizes=((0, 16), (50, 24)))
    shorter = stretched(schedule, 0.1)
    assert (shorter.warmup_epochs, shorter.sizes) == (1.0, ((0, 16), (5, 24)))
    assert stretched(ScheduleConfig(warmup_epochs=None, warmup_steps=30), 0.5).warmup_steps == 15
