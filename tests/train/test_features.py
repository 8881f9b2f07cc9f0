"""Representations: those of the method itself, each image decoded once, and only those of this very checkpoint kept."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.augment import center_recipe
from pipelines.beton import open_beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.plan import NUM_FINGERPRINTED
from tests.train.evaluated import CONFIG, make_sets, save_run, supervised_config
from train.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from train.evaluation import extractor
from train.evaluation.features import FeatureSource, features_of, representations_of
from train.evaluation.protocol import EvaluationConfig


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    make_sets(root)
    return root


@pytest.fixture
def ask(sets, tmp_path):
    """A configuration of the run in `tmp_path / "run"`."""

    def ask(**options):
        data = {split: str(sets / split / "set.beton") for split in ("train", "test")}
        defaults = {"train_data": data["train"], "test_data": data["test"], "device": "cpu", "batch_size": 10}
        return EvaluationConfig(**{"checkpoint": str(tmp_path / "run"), **defaults, **options})

    return ask


@pytest.fixture
def passes(monkeypatch):
    """Paths of the sets that are decoded, one for each pass."""
    seen, real = [], extractor.center_loader

    def counted(data, *rest):
        seen.append(data.path)
        return real(data, *rest)

    monkeypatch.setattr(extractor, "center_loader", counted)
    return seen


@torch.inference_mode()
def expected(method, data, num_layers):
    """h and what each layer of the head makes of it, of a whole set in one batch."""
    beton = open_beton(data)
    recipe = center_recipe(CONFIG.augment)
    with closing(FFCVLoader(beton, recipe, seed=0, global_batch_size=beton.num_samples, training=False)) as loader:
        (batch,) = loader.epoch(0)
    outputs = [method.encoder(batch.views[0])]
    for k in range(num_layers):
        outputs.append(method.projection_head.layers[k](outputs[-1].clone()))
    return outputs, batch.labels


def test_layers_are_the_methods_own_and_come_from_one_pass(ask, passes, tmp_path):
    method = save_run(tmp_path / "run")
    config = ask()
    found = representations_of(config, "test", layers=(0, 1, 2, -1))
    outputs, labels = expected(method, config.test_data, 3)
    for layer, output in zip((0, 1, 2, -1), outputs, strict=True):
        torch.testing.assert_close(found[layer].values, output, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[layer].labels, labels)
        assert found[layer].classes == ["class0", "class1", "class2", "class3"]
        assert found[layer].num_classes == 4
    assert [found[layer].values.shape[1] for layer in (0, 1, 2, -1)] == [64, 24, 24, 8]
    again = features_of(ask(head_layers=3), "test")
    assert torch.equal(again.values, found[-1].values)
    assert passes == [config.test_data]
    uncached = features_of(ask(head_layers=3, cache=False), "test")
    assert torch.equal(uncached.values, found[-1].values)
    assert passes == [config.test_data] * 2


def test_only_what_is_missing_is_computed(ask, passes, tmp_path):
    save_run(tmp_path / "run")
    features_of(ask(), "train")
    representations_of(ask(), "train", (0, 2))
    assert len(passes) == 2
    assert len(list((tmp_path / "run" / "evaluation" / "features").iterdir())) == 2


def test_no_other_checkpoints_features_are_taken(ask, passes, tmp_path):
    for seed in (4, 5):  # the second takes the first one's place
        method = save_run(tmp_path / "run", seed=seed, average_seed=6)
        outputs, _ = expected(method, ask().test_data, 0)
        torch.testing.assert_close(features_of(ask(), "test").values, outputs[0], rtol=1e-5, atol=1e-6)
    live, average = (features_of(ask(weights=weights), "test").values for weights in ("live", "average"))
    assert not torch.allclose(live, average)
    assert len(passes) == 3
    save_run(tmp_path / "run", step=8, seed=4)  # the same weights at another step
    features_of(ask(), "test")
    assert len(passes) == 3


def test_a_file_of_another_checkpoints_features_is_refused(ask, tmp_path):
    folder = tmp_path / "run" / "evaluation" / "features"
    save_run(tmp_path / "run", seed=4)
    features_of(ask(), "test")
    (first,) = folder.iterdir()
    save_run(tmp_path / "run", seed=5)
    features_of(ask(), "test")
    (second,) = set(folder.iterdir()) - {first}
    first.replace(second)
    with pytest.raises(
        ValueError, match=rf"{second} must hold features of `network` \w+, got those of \w+: .*; remove it"
    ):
        features_of(ask(), "test")


def test_random_and_pixels_depend_on_no_weights(ask, passes, tmp_path):
    for seed in (4, 5):
        save_run(tmp_path / "run", seed=seed)
        random, pixels = (features_of(ask(representation=kind), "test") for kind in ("random", "pixels"))
    assert random.values.shape == (24, 64)
    assert pixels.values.shape == (24, 3 * 16 * 16)
    assert len(passes) == 2
    head = representations_of(ask(representation="random"), "test", (0, -1))
    assert torch.equal(head[0].values, random.values)
    assert head[-1].values.shape == (24, 8)


def test_a_folder_is_represented_as_the_beton_that_was_made_of_it(ask, sets, tmp_path, monkeypatch):
    save_run(tmp_path / "run")
    folders = {f"{split}_data": str(sets / split / "images") for split in ("train", "test")}
    ours = features_of(ask(representation="pixels"), "test")
    monkeypatch.setattr(extractor, "cores_per_rank", lambda ranks: 0)  # decode here: processes take long to start
    theirs = features_of(ask(representation="pixels", **folders), "test")
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.classes == theirs.classes
    std = min(CONFIG.augment.std) if CONFIG.augment.std else 1.0
    assert (ours.values - theirs.values).abs().max() < 1.01 / 255 / std


@pytest.mark.parametrize(
    ("kept", "asked", "message"),
    [
        (1, 1, None),
        (1, 2, r"`head_layers` must be from 0 to 1, the layers of the projection head that .* holds \(of 3\), got 2"),
        (1, -1, "from 0 to 1, .*got -1"),
        (3, -1, None),
        (0, 1, "`head_layers` must be 0 for .*, which holds an encoder alone, got 1"),
    ],
)
def test_a_classifier_has_the_layers_that_it_kept(ask, tmp_path, kept, asked, message):
    method = save_run(tmp_path / "run", config=supervised_config(kept))
    if message:
        with pytest.raises(ValueError, match=message):
            features_of(ask(head_layers=asked), "test")
    else:
        outputs, _ = expected(method, ask().test_data, kept)
        torch.testing.assert_close(
            features_of(ask(head_layers=asked), "test").values, outputs[kept], rtol=1e-5, atol=1e-6
        )


def test_an_imported_encoder_has_no_head(ask, tmp_path):
    save_run(tmp_path / "run")
    checkpoint = load_checkpoint(checkpoint_path(tmp_path / "run", 4))
    encoder = {name: tensor for name, tensor in checkpoint.model.items() if name.startswith("encoder.")}
    save_checkpoint(tmp_path / "alone.safetensors", replace(checkpoint, model=encoder))
    found = FeatureSource(ask(checkpoint=str(tmp_path / "alone.safetensors")))
    assert found.features("test").values.shape == (24, 64)
    assert (tmp_path / "alone" / "evaluation" / "features").is_dir()
    with pytest.raises(
        ValueError, match=r"`head_layers` must be 0 for .*alone.safetensors, which holds an encoder alone"
    ):
        found.representations("test", (0, -1))


def test_an_encoder_that_diverged_is_named_and_nothing_is_kept(ask, tmp_path):
    save_run(tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 4)
    checkpoint = load_checkpoint(path)
    checkpoint.model["encoder.conv1.weight"][:] = torch.nan
    save_checkpoint(path, checkpoint)
    with pytest.raises(
        ValueError, match="test features must be finite, got NaN or infinity in 10 of 10 samples, first 0"
    ):
        features_of(ask(), "test")
    assert list((tmp_path / "run" / "evaluation" / "features").iterdir()) == []


def test_a_set_that_changed_is_represented_anew(ask, sets, passes, tmp_path):
    save_run(tmp_path / "run")
    root = tmp_path / "sets"
    make_sets(root, counts=(8, 80))
    (root / "test" / "set.beton.json").unlink()  # as FFCV writes betons: without a digest
    data = {f"{split}_data": str(root / split / "set.beton") for split in ("train", "test")}
    before = features_of(ask(representation="pixels", **data), "test").values.clone()
    path = root / "test" / "set.beton"
    beton = open_beton(path)
    row = min(set(range(80)) - set(np.linspace(0, 79, NUM_FINGERPRINTED).astype(int)))  # which the fingerprint skips
    start = int(beton.offsets[row])
    content = np.fromfile(path, np.uint8)
    content[start : start + 24 * 20 * 3] = 255 - content[start : start + 24 * 20 * 3]
    path.write_bytes(content.tobytes())
    after = features_of(ask(representation="pixels", **data), "test").values
    assert len(passes) == 2
    assert (before != after).any(dim=1).tolist() == [i == row for i in range(80)]
