"""The file's loader and the resident one on a GPU, against the CPU's views: streams, memory, ranks, devices."""

import psutil
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe, ViewRecipe
from pipelines.resident_loader import ResidentLoader
from tests.gpu.waiting import no_waiting
from tests.pipelines.betons import make_beton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda", 0)
SIZES = [(160 + 13 * i, 260 - 5 * i) for i in range(24)]
RECIPES = {
    "crop": Recipe(views=(ViewRecipe(size=64, flip_prob=0.5), ViewRecipe(size=33, interpolation="bicubic"))),
    "simclr": build_recipe(AugmentConfig(size=64)),
    "dino": build_recipe(AugmentConfig(recipe="dino", size=64, local_size=32, local_views=3)),
}
KINDS = {
    "crops": (FFCVLoader, {"geometry": "cpu"}),
    "images": (FFCVLoader, {"geometry": "device"}),
    "resident": (ResidentLoader, {}),
}
LEVEL = 1 / 255
# A crop may be a level off where it lies between two, which brightness, contrast and saturation amplify by 1.8 each and
# hue doubles; solarization turns a value at its threshold into its opposite.
MEAN, HIGHEST = 2e-4, {"crop": 1.01 * LEVEL, "simclr": 2 * 1.8**3 * LEVEL, "dino": 1.0}


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    return {encode: make_beton(tmp_path_factory.mktemp(encode), SIZES, encode=encode) for encode in ("jpeg", "raw")}


@pytest.fixture
def make_loader(betons):
    loaders = []

    def make(kind, recipe, encode="jpeg", **options):
        loader, chosen = KINDS[kind]
        options = {"seed": 3, "global_batch_size": 8, "num_threads": 4, "device": DEVICE} | chosen | options
        loaders.append(loader(betons[encode], recipe, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.fixture
def on_cpu(make_loader):
    def make(recipe, encode="jpeg", epoch=0, **options):
        loader = make_loader("crops", recipe, encode, device=torch.device("cpu"), **options)
        return list(loader.epoch(epoch))

    return make


def assert_close(ours, theirs, highest):
    assert ours.sample_indices.device.type == "cpu"
    assert torch.equal(ours.sample_indices, theirs.sample_indices)
    assert torch.equal(ours.labels.cpu(), theirs.labels)
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert a.shape == b.shape
        if len(a):
            difference = (a.float().cpu() - b).abs()
            assert difference.mean() < MEAN
            assert difference.max() < highest


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RECIPES)
def test_the_batches_are_those_of_the_cpu(make_loader, on_cpu, name, kind, encode):
    for ours, theirs in zip(
        make_loader(kind, RECIPES[name], encode).epoch(2), on_cpu(RECIPES[name], encode, epoch=2), strict=True
    ):
        assert all(tensor.device == DEVICE for tensor in (*ours.views, ours.labels))
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in ours.views)
        assert_close(ours, theirs, HIGHEST[name])


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_whole_on_a_stream_that_is_behind_and_are_not_overwritten(make_loader, on_cpu, kind, encode):
    options = {"global_batch_size": 2, "batches_ahead": 1} if kind != "resident" else {"global_batch_size": 2}
    loader = make_loader(kind, RECIPES["simclr"], encode, **options)
    load = torch.rand(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    stream, kept = torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        for i, batch in enumerate(loader.epoch(0)):
            load = load @ load / load.norm()  # the stream is behind when the next batch is asked for
            kept.append([view * 1 for view in batch.views] if i % 2 == 0 else batch.views)
        del batch
    stream.synchronize()
    expected = on_cpu(RECIPES["simclr"], encode, global_batch_size=2)
    for ours, theirs in zip(kept, expected, strict=True):
        for a, b in zip(ours, theirs.views, strict=True):
            assert (a.cpu() - b).abs().max() < HIGHEST["simclr"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_never_waits_for_the_device(make_loader, on_cpu, kind):
    loader = make_loader(kind, RECIPES["simclr"])
    for _ in loader.epoch(0):  # compiles
        pass
    torch.cuda.synchronize()
    with no_waiting():
        batches = list(loader.epoch(1))
    for ours, theirs in zip(batches, on_cpu(RECIPES["simclr"], epoch=1), strict=True):
        assert_close(ours, theirs, HIGHEST["simclr"])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_flat_over_50_epochs_of_images_of_mixed_sizes(make_loader, kind):
    loader = make_loader(kind, RECIPES["simclr"])

    def run(epochs):
        for epoch in epochs:
            for _ in loader.epoch(epoch):
                pass
        torch.cuda.synchronize()
        reserved = torch.cuda.memory_reserved(DEVICE)
        torch.cuda.empty_cache()  # also takes back what other streams have used
        return torch.cuda.memory_allocated(DEVICE), reserved, psutil.Process().memory_info().rss

    allocated, reserved, resident = run(range(10))
    later_allocated, later_reserved, later_resident = run(range(10, 60))
    assert later_allocated <= allocated
    assert later_reserved - reserved < 32 * 2**20  # the images of 50 epochs are 200 MB
    assert later_resident - resident < 64 * 2**20


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_may_get_no_image_in_evaluation(make_loader, on_cpu, kind):
    recipe = center_recipe(AugmentConfig(size=64))
    options = {"global_batch_size": 20, "rank": 7, "world_size": 8, "training": False}
    batches = list(make_loader(kind, recipe, **options).epoch(0))
    assert [batch.num_images for batch in batches] == [2, 0]
    for ours, theirs in zip(batches, on_cpu(recipe, **options), strict=True):
        assert_close(ours, theirs, HIGHEST["crop"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_is_not_the_current_one(make_loader, on_cpu, kind):
    there = torch.device("cuda", 1)
    with torch.cuda.device(0):
        batches = list(make_loader(kind, RECIPES["simclr"], device=there).epoch(0))
        assert torch.cuda.current_device() == 0
    for ours, theirs in zip(batches, on_cpu(RECIPES["simclr"]), strict=True):
        assert all(tensor.device == there for tensor in (*ours.views, ours.labels))
        assert_close(ours, theirs, HIGHEST["simclr"])
