"""What representations tell of a transformation: its labels against the pixels, and the classifier that reads them."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tv

from pipelines.beton import open_beton
from tests.pipelines.betons import make_beton
from tests.tools.encoder_checkpoints import write_checkpoint
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import config_from_dict
from train.evaluation.mlp import MLPConfig, mlp_accuracy
from train.evaluation.representation import LayeredNetwork
from train.evaluation.transform_prediction import (
    TEST_EPOCH,
    TRAIN_EPOCH,
    TransformPredictionConfig,
    open_images,
    predict_transformations,
    recipe_of,
    represent_transformed,
)
from train.evaluation.transform_tasks import TASKS

NUM, SIDE = 40, 16
CPU = torch.device("cpu")
ALL = tuple(TASKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformed")
    make_beton(folder, [(SIDE, SIDE)] * NUM, encode="raw")
    write_checkpoint(folder / "run" / "one.safetensors", side=SIDE, depth=10, width=0.125, stem="cifar")
    return folder


def config_of(folder, **options):
    files = {name: str(folder / "set.beton") for name in ("train_data", "test_data")}
    common = {"checkpoint": str(folder / "run" / "one.safetensors"), "device": "cpu", "batch_size": 16}
    return TransformPredictionConfig(**files | common | options)


def pixels_of(folder, epoch, **options):
    """Views [T, n, 3, S, S] as the encoder sees them, in [0, 1], and what was done, [T, n]."""
    config = config_of(folder, **options)
    trained = config_from_dict(load_checkpoint(folder / "run" / "one.safetensors").config)
    trained = dataclasses.replace(trained, augment=dataclasses.replace(trained.augment, mean=(0,) * 3, std=(1,) * 3))
    network = LayeredNetwork(nn.Flatten(), [nn.Identity()], (0, 1))
    data = open_images(config.train_data, config.num_train_images, config.seed, "train")
    found = represent_transformed(network, data, recipe_of(ALL, trained), config, epoch, CPU, 1)
    views = torch.stack([one.h for one in found]).view(len(ALL), -1, 3, SIDE, SIDE)
    assert all(torch.equal(one.h, one.z) for one in found)
    return views, torch.stack([one.applied for one in found])


def test_labels_say_what_was_done_to_the_pixels_and_nothing_else_was(folder):
    beton = open_beton(folder / "set.beton")
    stored = np.stack([beton.encoded(row).reshape(SIDE, SIDE, 3) for row in range(NUM)])
    plain = torch.from_numpy(stored).permute(0, 3, 1, 2) / 255.0
    views, applied = pixels_of(folder, TRAIN_EPOCH)
    by_name = dict(zip(ALL, zip(views, applied, strict=True), strict=True))

    def close(one, other):
        return ((one - other).abs().amax(dim=(1, 2, 3)) < 1e-3).tolist()

    gray, is_gray = by_name["color_vs_grayscale"]
    assert close(gray, tv.rgb_to_grayscale(plain, 3)) == (is_gray == 1).tolist()
    assert close(gray, plain) == (is_gray == 0).tolist()
    turned, turns = by_name["rotation"]
    for k in range(4):
        assert close(turned, plain.rot90(k, (-2, -1))) == (turns == k).tolist()
    noisy, is_noisy = by_name["original_vs_corrupted"]
    assert close(noisy, plain) == (is_noisy == 0).tolist()
    edges, is_edges = by_name["original_vs_sobel"]
    assert close(edges, plain) == (is_edges == 0).tolist()
    assert close(edges[:, :1], edges[:, 1:]) == (is_edges == 1).tolist()
    assert [sorted(set(labels.tolist())) for labels in applied] == [[0, 1], [0, 1, 2, 3], [0, 1], [0, 1]]


def test_draws_depend_on_seed_split_and_row_alone(folder):
    views, applied = pixels_of(folder, TRAIN_EPOCH)
    again = pixels_of(folder, TRAIN_EPOCH, batch_size=7)
    assert torch.equal(views, again[0])
    assert torch.equal(applied, again[1])
    assert not torch.equal(applied, pixels_of(folder, TEST_EPOCH)[1])
    assert not torch.equal(applied, pixels_of(folder, TRAIN_EPOCH, seed=1)[1])
    some = open_images(str(folder / "set.beton"), 10, 0, "train").rows
    assert sorted(set(some.tolist())) == some.tolist()
    assert torch.equal(pixels_of(folder, TRAIN_EPOCH, num_train_images=10)[1], applied[:, torch.from_numpy(some)])


def test_rates_are_those_of_random_guesses():
    for task in TASKS.values():
        (probability,) = task.changes.values()
        most = max(probability, 1 - probability)
        assert task.random_guess == pytest.approx(1 / 4 if task.num_classes == 4 else most)


def test_the_mlp_learns_what_no_linear_classifier_can_and_no_more_than_there_is():
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(1200, 2, generator=generator) + torch.tensor([30.0, -5.0])
    signs = (x - torch.tensor([30.0, -5.0])) > 0
    y = (signs[:, 0] ^ signs[:, 1]).long()
    config = MLPConfig(hidden_dim=32, epochs=40, lr=1e-2, batch_size=64)

    def accuracy(labels, seed=0, features=x):
        train, test = slice(0, 800), slice(800, None)
        options = {"num_classes": 2, "config": config, "seed": seed, "device": CPU}
        return mlp_accuracy(features[train], labels[train], features[test], labels[test], **options)

    assert accuracy(y) > 0.97
    assert accuracy(y) == accuracy(y)
    shuffled = y[torch.randperm(1200, generator=generator)]
    assert 0.4 < accuracy(shuffled) < 0.6
    constant = torch.ones(1200, 3)
    assert accuracy(torch.ones_like(y), features=constant) == 1.0


def test_a_head_that_forgets_everything_leaves_z_guessing_where_h_knows(folder, tmp_path):
    checkpoint = load_checkpoint(folder / "run" / "one.safetensors")
    checkpoint.model["projection_head.layers.0.0.weight"].zero_()
    save_checkpoint(tmp_path / "forgetful.safetensors", checkpoint)
    before = torch.get_rng_state()
    config = config_of(
        folder,
        checkpoint=str(tmp_path / "forgetful.safetensors"),
        tasks=("color_vs_grayscale", "original_vs_sobel"),
        mlp=MLPConfig(hidden_dim=16, epochs=30, lr=3e-3, batch_size=16),
        num_seeds=2,
    )
    record = predict_transformations(config)
    assert torch.equal(before, torch.get_rng_state())
    assert (record["step"], record["width"]) == (12, {"h": 64, "z": 128})
    assert record["num_images"] == {"train": NUM, "test": NUM}
    sobel, gray = record["tasks"]["original_vs_sobel"], record["tasks"]["color_vs_grayscale"]
    assert gray["measured"]["z"]["mean"] == pytest.approx(gray["most_common"])
    assert sobel["measured"]["z"]["mean"] in (
        pytest.approx(sobel["most_common"]),
        pytest.approx(1 - sobel["most_common"]),
    )
    assert sobel["measured"]["h"]["mean"] > 0.9
    assert len(sobel["measured"]["h"]["by_seed"]) == 2
    assert (gray["in_pretraining"], sobel["in_pretraining"]) == (True, False)
    assert sobel["published"] == {"h": 0.966, "z": 0.563}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train_images": 41}, "`num_train_images` must be at most 40, the images of .*, got 41"),
        ({"num_test_images": 0}, "`num_test_images` must be null"),
        ({"tasks": ("rotation", "rotation")}, "`tasks` must name at least one, each once"),
        ({"num_seeds": 0}, "`num_seeds` must be at least 1"),
    ],
)
def test_bad_settings_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        predict_transformations(config_of(folder, **options))


def test_a_checkpoint_without_its_head_has_no_z(folder, tmp_path):
    whole = load_checkpoint(folder / "run" / "one.safetensors")
    for name in [name for name in whole.model if name.startswith("projection_head.layers.1")]:
        del whole.model[name]
    save_checkpoint(tmp_path / "part.safetensors", whole)
    with pytest.raises(ValueError, match=r"must hold the whole projection head.*got 1 of its 2 layers"):
        predict_transformations(config_of(folder, checkpoint=str(tmp_path / "part.safetensors")))
