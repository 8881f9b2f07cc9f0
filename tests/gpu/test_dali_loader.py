"""The DALI loader on a GPU: nvJPEG's pixels against libjpeg-turbo's, batches in order on the stream, memory."""

import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe, center_recipe, supervised_view
from pipelines.beton import open_beton
from pipelines.dali_loader import DALILoader
from pipelines.ffcv_loader import FFCVLoader
from pipelines.recipe import Recipe
from tests.pipelines.betons import make_beton

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZES = [(160 + 13 * i, 260 - 5 * i) for i in range(24)]
CROP = Recipe(views=(supervised_view(AugmentConfig(size=64)),) * 2)
RECIPES = {
    "crop": CROP,
    "bicubic": Recipe(views=(supervised_view(AugmentConfig(size=64, interpolation="bicubic")),)),
    "simclr": build_recipe(AugmentConfig(size=64)),
    "dino": build_recipe(AugmentConfig(recipe="dino", size=64, local_size=32, local_views=3)),
}
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    return {encode: make_beton(tmp_path_factory.mktemp(encode), SIZES, encode=encode) for encode in ("jpeg", "raw")}


@pytest.fixture
def make_loader(betons):
    loaders = []

    def make(recipe, data=None, kind=DALILoader, **options):
        options = {"seed": 0, "global_batch_size": 8, "num_threads": 4, "device": DEVICE} | options
        loaders.append(kind(data or betons["jpeg"], recipe, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def assert_close(ours, theirs, *, mean, highest):
    assert ours.sample_indices.tolist() == theirs.sample_indices.tolist()
    assert ours.labels.tolist() == theirs.labels.tolist()
    for a, b in zip(ours.views, theirs.views, strict=True):
        difference = 255 * (a.cpu() - b.cpu()).abs()
        assert difference.mean() <= mean
        assert difference.max() <= highest


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_batches_are_those_of_the_cpu(make_loader, betons, name, encode):
    # Two JPEG decoders may differ by a few levels a pixel, which strong jitter multiplies; raw pixels are the same.
    ours = make_loader(RECIPES[name], betons[encode], seed=3)
    theirs = make_loader(RECIPES[name], betons[encode], FFCVLoader, seed=3, device=torch.device("cpu"))
    tolerance = {"mean": 2.0, "highest": 80.0} if encode == "jpeg" else {"mean": 0.3, "highest": 20.0}
    for a, b in zip(ours.epoch(2), theirs.epoch(2), strict=True):
        assert all(view.device == DEVICE for view in a.views)
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in a.views)
        assert a.labels.device == DEVICE
        assert_close(a, b, **tolerance)


def test_dalis_colors_on_the_gpu_are_those_on_the_cpu(make_loader, betons):
    both = [
        make_loader(RECIPES["simclr"], betons["raw"], photometric="dali", device=device)
        for device in (DEVICE, torch.device("cpu"))
    ]
    for a, b in zip(*(loader.epoch(0) for loader in both), strict=True):
        assert_close(a, b, mean=1.0, highest=20.0)


@pytest.mark.parametrize("photometric", ["ours", "dali"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_whole_on_a_busy_stream_and_are_not_overwritten(make_loader, photometric, dtype):
    options = {"photometric": photometric, "dtype": dtype, "global_batch_size": 4}
    expected = [[view.float().cpu() for view in batch.views] for batch in make_loader(CROP, **options).epoch(0)]
    load = torch.rand(4096, 4096, device=DEVICE)
    kept = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in make_loader(CROP, **options).epoch(0):
            load = load @ load / load.norm()  # the stream is behind when the next batch is asked for
            kept.append([view * 1 for view in batch.views])
        torch.cuda.current_stream().synchronize()
    for ours, theirs in zip(kept, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert 255 * (a.float().cpu() - b).abs().max() < 20  # two of the GPU's JPEG decoders may differ


def test_a_restarted_epoch_goes_on_with_the_same_batches(make_loader):
    whole = list(make_loader(CROP).epoch(1))
    for a, b in zip(make_loader(CROP).epoch(1, start_batch=1), whole[1:], strict=True):
        assert_close(a, b, mean=0.5, highest=20.0)


def test_evaluation_keeps_the_partial_batch(make_loader):
    loader = make_loader(center_recipe(AugmentConfig(size=64)), global_batch_size=10, training=False)
    batches = list(loader.epoch(0))
    assert [batch.num_images for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.sample_indices for batch in batches]).tolist() == list(range(24))


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_a_truncated_jpeg_is_named_and_replaced(make_loader, betons, tmp_path, end):
    beton = betons["jpeg"]
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[13]), int(beton.sizes[13])
    data[start + size // 2 : start + size] = bytes(size - size // 2 - len(end)) + end
    path = tmp_path / "set.beton"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sample 13 .*cannot be decoded: "):
        list(make_loader(CROP, open_beton(path)).epoch(0))
    loader = make_loader(CROP, open_beton(path), on_error="skip")
    indices = torch.cat([batch.sample_indices for batch in loader.epoch(0)]).tolist()
    assert sorted(indices) == sorted([i for i in range(24) if i != 13] + [14])


def test_memory_stays_flat_over_50_epochs(make_loader):
    loader = make_loader(RECIPES["simclr"])

    def run(epochs):
        for epoch in epochs:
            for _ in loader.epoch(epoch):
                pass
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(DEVICE)[0]

    before = run(range(10))
    assert before - run(range(10, 60)) < 64 * 2**20
