"""Nearest neighbours during a run: the figure of `train/evaluate.py knn`, on any number of ranks, without a trace."""

import dataclasses
import math
import random
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.distributed as dist

from model.build import ModelConfig, build_method
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from pipelines.subset import SubsetConfig, choose_rows
from tests.distributed.ranks import run_ranks
from tests.pipelines.betons import make_beton
from train.config import PretrainConfig
from train.evaluation.extractor import center_loader
from train.evaluation.knn import knn_accuracy
from train.evaluation.labelled_data import open_labelled
from train.evaluation.representation import open_residual_branches
from train.online.config import OnlineConfig
from train.online.nearest import nearest_neighbours
from train.online.neighbour_sets import balanced_rows, open_neighbour_sets
from train.runtime import Ranks

NUM_TRAIN, NUM_TEST, CLASSES, CHUNK, K = 45, 31, 3, 4, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of the same classes."""
    folder = tmp_path_factory.mktemp("neighbours")
    for name, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        make_beton(folder / name, [(12, 10)] * count, encode="raw", num_classes=CLASSES)
    return folder


def config_of(data, **online):
    options = {"knn_every_epochs": 1, "knn_neighbours": K, "knn_batch_size": CHUNK} | online
    return PretrainConfig(
        name="run",
        data=DataConfig(path=str(data / "train/set.beton"), global_batch_size=8),
        augment=AugmentConfig(size=8),
        model=ModelConfig(encoder=EncoderConfig(depth=10, width=0.125, stem="cifar")),
        online=OnlineConfig(test_data=str(data / "test/set.beton"), **options),
    )


def encoder_of(config):
    """In training mode, with running statistics that no batch has, and blocks that are open."""
    encoder = build_method(config.model, seed=1).encoder
    open_residual_branches(encoder)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in encoder.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5, generator=generator)
    return encoder


def measure(config, encoder, beat=lambda: None):
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ranks = Ranks(rank=rank, world_size=size, local_rank=rank, local_world_size=size)
    sets = open_neighbour_sets(config.online, config.data)
    return nearest_neighbours(encoder, sets, config, ranks=ranks, device=CPU, num_threads=1, beat=beat)["knn_accuracy"]


def evaluated(config, encoder):
    """The same by the parts of `train/evaluate.py knn`, which takes every sample."""
    sets = []
    for path in (config.data.path, config.online.test_data):
        with closing(center_loader(open_labelled(path, "test"), config, 7, CPU, 1)) as loader, torch.inference_mode():
            batches = [(encoder.eval()(batch.views[0]), batch.labels) for batch in loader.epoch(0)]
        sets += [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return knn_accuracy(*sets, k=K)


def test_the_figure_is_that_of_the_evaluation(data):
    config = config_of(data)
    accuracy = measure(config, encoder_of(config))
    assert accuracy == evaluated(config, encoder_of(config))
    assert 0.35 < accuracy < 1.0, "the problem must be neither trivial nor hopeless"


def check_ranks(rank, data, expected):
    """There are 12 and 8 chunks for 1, 2 or 3 ranks; at last 2 for 3."""
    for online, accuracy in expected:
        config = config_of(data, **online)
        assert measure(config, encoder_of(config)) == accuracy


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_figure_is_the_same_on_any_number_of_ranks(data, world_size):
    options = [{}, {"knn_train_samples": 13, "knn_test_samples": 11}, {"knn_batch_size": 25, "knn_train_samples": 20}]
    expected = [(online, measure(config_of(data, **online), encoder_of(config_of(data)))) for online in options]
    assert len({accuracy for _, accuracy in expected}) > 1
    run_ranks(check_ranks, world_size, data, expected)


def test_nothing_of_the_run_changes(data):
    config = config_of(data)
    encoder = encoder_of(config)
    measure(config, encoder)  # once before: what loads compiled code the first time draws from Python's generator
    encoder.layer2.eval()  # say, frozen
    modes = [module.training for module in encoder.modules()]
    tensors = {name: value.clone() for name, value in encoder.state_dict().items()}
    before = (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002
    encoder.forward = lambda views: pytest.fail("a compiled forward was called")
    beats = []
    measure(config, encoder, beat=lambda: beats.append(1))
    assert len(beats) == math.ceil(NUM_TRAIN / CHUNK) + math.ceil(NUM_TEST / CHUNK) + 1
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(value, tensors[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    assert torch.is_grad_enabled()


def test_an_encoder_that_has_diverged_has_no_accuracy(data, caplog):
    config = config_of(data)
    encoder = encoder_of(config)
    encoder.bn1.running_mean[0] = math.nan
    assert math.isnan(measure(config, encoder))
    assert "nearest neighbours were not measured: the encoder's output is not finite" in caplog.text


def test_rows_are_balanced_and_always_the_same():
    labels = np.random.default_rng(0).choice(4, 1000, p=[0.6, 0.35, 0.045, 0.005])
    counts = np.bincount(labels)
    rows = balanced_rows(labels, 200)
    assert len(rows) == 200
    assert np.all(np.diff(rows) > 0)
    few = counts[2] + counts[3]
    assert np.bincount(labels[rows])[2:].tolist() == counts[2:].tolist()
    assert abs(np.bincount(labels[rows])[0] - (200 - few) / 2) <= 1
    assert np.array_equal(rows, balanced_rows(labels, 200))
    assert set(balanced_rows(labels, 50)) <= set(rows)
    assert 2 < np.mean(np.diff(rows)) < 8, "spread over the file"
    for limit in (0, 1000, 1001):
        assert np.array_equal(balanced_rows(labels, limit), np.arange(1000))


def test_hidden_labels_are_no_neighbours(data):
    config = config_of(data)
    shown = dataclasses.replace(config.data, labelled=SubsetConfig(per_class=4), subset=SubsetConfig(fraction=0.5))
    found, whole = (open_neighbour_sets(config.online, each).train for each in (shown, config.data))
    rows = choose_rows(shown.labelled, whole.labels, None, len(whole.labels))
    assert found.labels.tolist() == whole.labels[rows].tolist()
    assert found.beton.offsets.tolist() == whole.beton.offsets[rows].tolist()
    one = dataclasses.replace(shown, labelled=SubsetConfig(fraction=0.01))
    named = dataclasses.replace(config.online, train_data=config.data.path)
    assert len(open_neighbour_sets(named, one).train.labels) == NUM_TRAIN  # another set is not hidden


def test_chosen_samples_are_those_of_the_file(data):
    sets = open_neighbour_sets(config_of(data, knn_train_samples=10).online, config_of(data).data)
    whole = open_neighbour_sets(config_of(data).online, config_of(data).data)
    rows = balanced_rows(whole.train.labels, 10)
    assert sets.train.labels.tolist() == whole.train.labels[rows].tolist()
    for i, row in enumerate(rows):
        assert np.array_equal(sets.train.beton.encoded(i), whole.train.beton.encoded(int(row)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knn_every_epochs": 1}, "`online.knn_every_epochs` needs `online.test_data`, got null"),
        ({"knn_every_epochs": -1}, "`online.knn_every_epochs` must be at least 0, got -1"),
        ({"knn_neighbours": 20, "knn_train_samples": 19}, "`online.knn_train_samples` must be at least"),
        ({"probe_lr": 0.0}, "`online.probe_lr` must be finite and above 0, got 0.0"),
        ({"probe_momentum": 1.0}, "`online.probe_momentum` must be in [0, 1), got 1.0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        OnlineConfig(**options)
    assert message in str(caught.value)


def test_sets_that_cannot_be_are_refused(data, tmp_path):
    def refused(config, **changes):
        with pytest.raises(ValueError) as caught:
            open_neighbour_sets(config.online, DataConfig(**{"path": config.data.path} | changes))
        return str(caught.value)

    assert "no such file" in refused(config_of(tmp_path))
    assert "must not exceed the 45 samples" in refused(config_of(data, knn_neighbours=46))
    assert "must name a labelled .beton where `data.loader` is folder" in refused(config_of(data), loader="folder")
    make_beton(tmp_path / "train", [(9, 9)] * 4, num_classes=1)
    make_beton(tmp_path / "test", [(9, 9)] * 4, num_classes=2)
    assert "must have the classes of `train_data`" in refused(config_of(tmp_path, knn_neighbours=2))
    assert open_neighbour_sets(OnlineConfig(), config_of(tmp_path).data) is None
