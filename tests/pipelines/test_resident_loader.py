"""The resident loader: the views of the file's loader, with nothing loaded after the beginning."""

import logging
import threading

import numpy as np
import pytest
import torch

from pipelines import resident_loader
from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.batch import Batch
from pipelines.beton import open_beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe, ViewRecipe
from pipelines.resident_loader import ResidentLoader
from tests.pipelines.betons import make_beton

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
SIMCLR = build_recipe(AugmentConfig(size=32))
CROPS = Recipe(views=(ViewRecipe(size=32, flip_prob=0.5), ViewRecipe(size=17)))
LEVEL = 1 / 255


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def beton(request, tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("set"), SIZES, encode=request.param)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("jpegs"), SIZES)


def resident(beton, recipe=SIMCLR, **options) -> ResidentLoader:
    return ResidentLoader(beton, recipe, **{"seed": 3, "global_batch_size": 8, "num_threads": 2} | options)


def streamed(beton, recipe=SIMCLR, *, epoch=0, **options) -> list[Batch]:
    loader = FFCVLoader(beton, recipe, **{"seed": 3, "global_batch_size": 8, "num_threads": 2} | options)
    try:
        return list(loader.epoch(epoch))
    finally:
        loader.close()


def assert_same(ours, theirs):
    assert torch.equal(ours.sample_indices, theirs.sample_indices)
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.epoch == theirs.epoch
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert torch.equal(a, b)


def test_crops_are_the_file_loaders_within_a_level(beton):
    for ours, theirs in zip(resident(beton, CROPS).epoch(2), streamed(beton, CROPS, epoch=2), strict=True):
        assert torch.equal(ours.sample_indices, theirs.sample_indices)
        assert torch.equal(ours.labels, theirs.labels)
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert (a - b).abs().max() < 1.01 * LEVEL
            assert (a != b).float().mean() < 0.01  # of the values; ties of the rounding


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_images_of_any_shape_are_taken(tmp_path, encode):
    odd = make_beton(tmp_path, [(1, 1), (4000, 3), (2, 1500), (17, 17), (1, 40), (90, 1)], encode=encode)
    options = {"global_batch_size": 6}
    (ours,), (theirs,) = resident(odd, CROPS, **options).epoch(0), streamed(odd, CROPS, **options)
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert (a - b).abs().max() < 1.01 * LEVEL


def test_whole_views_are_the_file_loaders(beton):
    for ours, theirs in zip(resident(beton).epoch(1), streamed(beton, epoch=1), strict=True):
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            assert (a - b).abs().mean() < 2e-4
            # A level here and there, which brightness, contrast and saturation amplify by 1.8 each, and hue doubles.
            assert (a - b).abs().max() < 2 * 1.8**3 * LEVEL


def test_small_blocks_and_any_number_of_threads_pack_the_same_pixels(beton, monkeypatch):
    whole = resident(beton, num_threads=1)
    monkeypatch.setattr(resident_loader, "BLOCK_BYTES", 1)
    image_by_image = resident(beton, num_threads=3)
    monkeypatch.setattr(resident_loader, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(resident_loader, "SAMPLES_PER_CHUNK", 2)
    in_blocks = resident(beton, num_threads=3)
    for other in (image_by_image, in_blocks):
        for ours, theirs in zip(other.epoch(0), whole.epoch(0), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one(beton, world_size):
    ranks = [resident(beton, rank=rank, world_size=world_size).epoch(5) for rank in range(world_size)]
    for whole, *parts in zip(resident(beton).epoch(5), *ranks, strict=True):
        assert torch.equal(torch.cat([part.sample_indices for part in parts]), whole.sample_indices)
        for v, view in enumerate(whole.views):
            assert torch.equal(torch.cat([part.views[v] for part in parts]), view)


def test_a_resumed_epoch_goes_on_with_the_same_batches(jpegs):
    loader = resident(jpegs)
    batches = loader.epoch(4)
    next(batches)
    expected = list(batches)
    again = resident(jpegs)
    first = again.epoch(4)
    next(first)
    state = again.state_dict()
    assert (state["epoch"], state["next_batch"]) == (4, 1)
    epoch, start = resident(jpegs).load_state_dict(state)
    for ours, theirs in zip(resident(jpegs).epoch(epoch, start), expected, strict=True):
        assert_same(ours, theirs)


def test_positions_are_exchanged_with_the_file_loader(jpegs):
    loader = resident(jpegs)
    next(loader.epoch(2))
    streaming = FFCVLoader(jpegs, SIMCLR, seed=3, global_batch_size=8)
    try:
        assert streaming.load_state_dict(loader.state_dict()) == (2, 1)
    finally:
        streaming.close()


def test_evaluation_keeps_order_and_every_image(beton):
    recipe = center_recipe(AugmentConfig(size=20))
    ranks = [
        list(resident(beton, recipe, global_batch_size=23, training=False, rank=rank, world_size=2).epoch(0))
        for rank in range(2)
    ]
    assert [batch.num_images for batch in ranks[0]] == [12, 1]
    assert [batch.num_images for batch in ranks[1]] == [11, 0]
    assert ranks[1][1].views[0].shape == (0, 3, 20, 20)
    rows = torch.cat([rank[b].sample_indices for b in range(2) for rank in ranks])
    assert rows.tolist() == list(range(24))


def test_bfloat16_views_are_the_rounded_float32_ones(jpegs):
    half, full = next(resident(jpegs, dtype=torch.bfloat16).epoch(0)), next(resident(jpegs).epoch(0))
    assert half.views[0].dtype == torch.bfloat16
    torch.testing.assert_close(half.views[0].float(), full.views[0], rtol=2**-8, atol=1e-6)


def test_no_thread_is_left_after_the_beginning(jpegs):
    before = threading.active_count()
    loader = resident(jpegs)
    next(loader.epoch(0))
    assert threading.active_count() == before


def test_a_closed_loader_says_so(jpegs):
    loader = resident(jpegs)
    loader.close()
    with pytest.raises(RuntimeError, match="the loader was closed"):
        next(loader.epoch(0))


def test_a_set_that_does_not_fit_is_refused_before_it_is_decoded(jpegs, monkeypatch):
    needed = int((jpegs.widths.astype(int) * jpegs.heights * 3).sum())
    monkeypatch.setattr(resident_loader, "free_bytes", lambda device: 2 * needed)
    resident(jpegs).close()
    monkeypatch.setattr(resident_loader, "free_bytes", lambda device: 2 * needed - 1)
    monkeypatch.setattr(resident_loader, "Decompressor", None)  # whoever called it would fail
    with pytest.raises(
        ValueError, match=r"must fit into 50% of cpu's free memory .* 24 images .* need 0.00 GiB, 0.00 GiB are free"
    ):
        resident(jpegs)


def test_the_cpus_free_memory_is_between_none_and_all():
    assert 2**26 < resident_loader.free_bytes(torch.device("cpu")) < 2**50


def damage(beton, samples, folder):
    """A copy of the file in which some JPEGs are cut off in the middle (their rest is zeros)."""
    data = bytearray(beton.path.read_bytes())
    for sample in samples:
        start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
        data[start + size // 2 : start + size] = bytes(size - size // 2)
    path = folder / beton.path.name
    path.write_bytes(data)
    (folder / (path.name + ".json")).write_bytes((beton.path.parent / (path.name + ".json")).read_bytes())
    return open_beton(path)


def test_a_sample_that_cannot_be_decoded_stops_by_name(jpegs, tmp_path):
    with pytest.raises(ValueError, match=r"sample 13 \(class1/0013.png\) of .*set.beton cannot be decoded: .*JPEG"):
        resident(damage(jpegs, [13], tmp_path))


def test_samples_that_cannot_be_decoded_are_named_counted_and_replaced(jpegs, tmp_path, caplog):
    bad = damage(jpegs, [12, 13, 23], tmp_path)
    with caplog.at_level(logging.WARNING):
        loader = resident(bad, CROPS, on_error="skip")
    assert loader.num_skipped == 4  # 12 → 13 → 14, 13 → 14, 23 → 0
    assert "sample 13 (class1/0013.png)" in caplog.text
    for ours, theirs in zip(loader.epoch(0), streamed(bad, CROPS, on_error="skip"), strict=True):
        assert torch.equal(ours.sample_indices, theirs.sample_indices)
        for a, b in zip(ours.views, theirs.views, strict=True):
            assert (a - b).abs().max() < 1.01 * LEVEL
    rows = np.concatenate([batch.sample_indices for batch in loader.epoch(0)])
    assert sorted(rows.tolist()) == sorted([*range(12), 14, 14, *range(14, 23), 0])
