"""The loader for plain folders: torchvision's samples, and the views that the file's loader gives."""

import logging
import multiprocessing
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as F

from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.beton import open_beton
from pipelines.draw import draw_views
from pipelines.ffcv_loader import FFCVLoader
from pipelines.folder_dataset import decode_image
from pipelines.folder_loader import FolderLoader
from pipelines.order import epoch_order
from pipelines.photometric import reference
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.betons import natural_image, needs_data
from tools.convert import convert
from tools.image_encoding import EncodeOptions

NUM = 20
SIMCLR = build_recipe(AugmentConfig(size=32))
CROPS = Recipe(views=(ViewRecipe(size=32, flip_prob=0.5), ViewRecipe(size=17)))
LEVEL = 1 / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs of two classes, one of them with a folder below; some gray, with and without chroma subsampling."""
    root = tmp_path_factory.mktemp("images")
    for i in range(NUM):
        path = root / ("ape" if i < 8 else "zebra/young" if i < 12 else "zebra") / f"{i * 7 % NUM:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = natural_image(60 + 3 * i, 80 - 2 * i, i).convert("L" if i % 7 == 3 else "RGB")
        image.save(path, quality=90, subsampling=(0, 2)[i % 2])
    return root


@pytest.fixture
def make_loader(folder):
    loaders = []

    def make(recipe=SIMCLR, root=folder, **options):
        loaders.append(FolderLoader(root, recipe, **{"seed": 3, "global_batch_size": 8} | options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def assert_same(ours, theirs):
    assert torch.equal(ours.sample_indices, theirs.sample_indices)
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.epoch == theirs.epoch
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert torch.equal(a, b)


def converted(root, folder, encode="keep"):
    convert(root, folder / "set.beton", EncodeOptions(encode=encode), workers=1)
    return open_beton(folder / "set.beton")


def assert_crops_within_a_level(loader, beton, recipe, *, epoch, batch_size):
    file_loader = FFCVLoader(beton, recipe, seed=3, global_batch_size=batch_size, num_threads=2)
    try:
        for ours, theirs in zip(loader.epoch(epoch), file_loader.epoch(epoch), strict=True):
            assert torch.equal(ours.sample_indices, theirs.sample_indices)
            assert torch.equal(ours.labels, theirs.labels)
            for a, b in zip(ours.views, theirs.views, strict=True):
                assert (a - b).abs().max() < 1.01 * LEVEL
                assert (a != b).float().mean() < 0.01  # of the values; ties of the rounding
    finally:
        file_loader.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_folder_and_its_beton_give_the_same_crops(make_loader, folder, tmp_path, interpolation):
    views = (ViewRecipe(size=32, flip_prob=0.5, interpolation=interpolation), ViewRecipe(size=17))
    recipe = Recipe(views=views)
    assert_crops_within_a_level(make_loader(recipe), converted(folder, tmp_path), recipe, epoch=2, batch_size=8)


def test_images_of_any_shape_give_the_same_crops(make_loader, tmp_path):
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(1, 1), (4000, 3), (2, 1500), (17, 17), (1, 40), (90, 1)]):
        natural_image(*size, i).save(tmp_path / "images" / f"{i}.jpg", quality=90, subsampling=0)
    beton = converted(tmp_path / "images", tmp_path)
    loader = make_loader(CROPS, root=tmp_path / "images", global_batch_size=6)
    assert_crops_within_a_level(loader, beton, CROPS, epoch=0, batch_size=6)


@needs_data
def test_photographs_and_their_beton_give_the_same_crops(tmp_path):
    root = tmp_path / "photographs"
    root.mkdir()
    with tarfile.open(Path(os.environ["TWINVIEW_DATA"], "imagenet-sample.tar")) as tar:
        for name in sorted(name for name in tar.getnames() if name.endswith(".JPEG"))[::40]:
            (root / Path(name).name).write_bytes(tar.extractfile(name).read())
    recipe = Recipe(views=(ViewRecipe(size=224, flip_prob=0.5),))
    loader = FolderLoader(root, recipe, seed=3, global_batch_size=8)
    assert_crops_within_a_level(loader, converted(root, tmp_path), recipe, epoch=1, batch_size=8)


def test_samples_and_labels_are_torchvisions(make_loader, folder):
    theirs = ImageFolder(str(folder))
    loader = make_loader(center_recipe(AugmentConfig(size=8)), training=False)
    batches = list(loader.epoch(0))
    assert loader.dataset.files == [file for file, _ in theirs.samples]
    assert torch.cat([batch.sample_indices for batch in batches]).tolist() == list(range(NUM))
    assert torch.cat([batch.labels for batch in batches]).tolist() == theirs.targets


def test_a_batch_is_decode_crop_and_chain_by_others(make_loader):
    batch = next(make_loader(seed=4).epoch(3))
    loader = make_loader()
    samples = epoch_order(4, 3, NUM)[:8]
    assert batch.sample_indices.tolist() == samples.tolist()
    images = [np.array(Image.open(loader.dataset.files[sample]).convert("RGB")) for sample in samples]
    widths, heights = (np.array([image.shape[axis] for image in images], np.int32) for axis in (1, 0))
    params = draw_views(SIMCLR, 4, 3, samples, widths, heights)
    for v, view in enumerate(SIMCLR.views):
        assert batch.views[v].is_contiguous(memory_format=torch.channels_last)
        crops = []
        for p, image in zip(params[:, v], images, strict=True):
            window = [int(p[name]) for name in ("top", "left", "height", "width")]
            x = F.resized_crop(torch.from_numpy(image).permute(2, 0, 1).double(), *window, [32, 32], antialias=True)
            crops.append((x.flip(-1) if p["flip"] else x).round().to(torch.uint8))
        expected = reference.photometric(torch.stack(crops), params[:, v], view, SIMCLR, torch.float64)
        assert (batch.views[v].double() - expected).abs().mean() < 2e-4


def test_processes_do_not_change_the_batches(make_loader):
    before = set(multiprocessing.active_children())  # those of other tests of this process
    alone, several = make_loader(), make_loader(num_workers=2, batches_ahead=3)
    for ours, theirs in zip(several.epoch(1), alone.epoch(1), strict=True):
        assert_same(ours, theirs)
    next(several.epoch(2))  # left early, with batches in the making
    for ours, theirs in zip(several.epoch(3, 1), list(alone.epoch(3))[1:], strict=True):
        assert_same(ours, theirs)
    assert len(set(multiprocessing.active_children()) - before) == 2
    several.close()
    assert set(multiprocessing.active_children()) <= before


def test_processes_do_not_hear_who_asks_the_run_to_stop(make_loader):
    """A Ctrl-C, and Slurm, signal all of a rank's processes; the rank goes on to the end of its step."""
    before = set(multiprocessing.active_children())
    batches = make_loader(num_workers=1, batches_ahead=1).epoch(0)
    next(batches)
    (child,) = set(multiprocessing.active_children()) - before
    masks = dict(line.split(":\t") for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(child.pid, number)
        assert int(masks["SigBlk"], 16) >> (number - 1) & 1
    next(batches)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one(make_loader, world_size):
    ranks = [make_loader(rank=rank, world_size=world_size).epoch(5) for rank in range(world_size)]
    for whole, *parts in zip(make_loader().epoch(5), *ranks, strict=True):
        assert torch.equal(torch.cat([part.sample_indices for part in parts]), whole.sample_indices)
        for v, view in enumerate(whole.views):
            assert torch.equal(torch.cat([part.views[v] for part in parts]), view)


def test_a_resumed_epoch_goes_on_with_the_same_batches(make_loader):
    loader = make_loader()
    batches = loader.epoch(4)
    next(batches)
    state = loader.state_dict()
    assert make_loader().load_state_dict(state) == (4, 1)
    for ours, theirs in zip(make_loader().epoch(4, 1), batches, strict=True):
        assert_same(ours, theirs)


def test_a_changed_folder_is_not_resumed(make_loader, folder, tmp_path):
    state = make_loader().state_dict()
    other = tmp_path / "images"
    shutil.copytree(folder, other)
    assert make_loader(root=other).load_state_dict(state) == (0, 0)  # wherever it lies
    natural_image(70, 70, 99).save(other / "ape" / "00.jpg")
    with pytest.raises(ValueError, match="the checkpoint was made with `dataset`"):
        make_loader(root=other).load_state_dict(state)


def test_a_rank_without_a_share_of_the_last_batch_gets_an_empty_one(make_loader):
    recipe = center_recipe(AugmentConfig(size=8))
    last = list(make_loader(recipe, global_batch_size=19, training=False, rank=1, world_size=2).epoch(0))[-1]
    assert last.num_images == 0
    assert last.views[0].shape == (0, 3, 8, 8)
    assert last.labels.shape == (0,)


def test_images_without_class_folders_have_no_label(make_loader, folder, tmp_path):
    for file in (folder / "ape").iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    loader = make_loader(center_recipe(AugmentConfig(size=8)), root=tmp_path, training=False)
    assert loader.dataset.files == sorted(str(file) for file in tmp_path.glob("*.jpg"))
    assert next(loader.epoch(0)).labels.tolist() == [-1] * 8


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb_as_by_pillow(tmp_path, mode):
    image = natural_image(20, 10, 0).convert("RGBA" if mode == "LA" else "RGB").convert(mode)
    image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    expected = np.array(Image.open(next(tmp_path.iterdir())).convert("RGB"))
    assert (decode_image(str(next(tmp_path.iterdir()))).permute(1, 2, 0).numpy() == expected).all()


def test_exif_orientation_is_not_applied_as_in_torchvision(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    natural_image(20, 10, 0).save(tmp_path / "a.jpg", exif=exif)
    assert decode_image(str(tmp_path / "a.jpg")).shape == (3, 10, 20)


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy in which sample 2 is cut off and sample 3 no image."""
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    files = [file for file, _ in ImageFolder(str(root)).samples]
    Path(files[2]).write_bytes(Path(files[2]).read_bytes()[:700])
    Path(files[3]).write_bytes(b"no image")
    return root


def test_an_image_that_cannot_be_decoded_stops_by_name(make_loader, damaged):
    with pytest.raises(
        ValueError, match=r"sample 2 \(.*ape.*jpg\) cannot be decoded: .*truncated.*; remove it, or set"
    ):
        list(make_loader(root=damaged, training=False).epoch(0))


def test_images_that_cannot_be_decoded_are_named_counted_and_replaced(make_loader, damaged, caplog):
    loader = make_loader(root=damaged, training=False, on_error="skip")
    with caplog.at_level(logging.WARNING):
        batch = next(loader.epoch(0))
    assert loader.num_skipped == 3  # 2 → 3 → 4 and 3 → 4
    assert "not an image of a known format" in caplog.text
    assert batch.sample_indices.tolist() == [0, 1, 4, 4, 4, 5, 6, 7]
    assert torch.equal(batch.views[0][2], batch.views[0][4])
    assert torch.equal(batch.views[1][3], batch.views[1][4])


def test_a_folder_of_bad_images_stops_even_when_skipping(make_loader, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(make_loader(root=tmp_path, on_error="skip").epoch(0))


def test_no_images_and_no_folder_are_refused_by_name(make_loader, tmp_path):
    with pytest.raises(ValueError, match="must hold images, or class folders with images, found none"):
        make_loader(root=tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        make_loader(root=tmp_path / "nowhere")
    (tmp_path / "ape").mkdir()
    with pytest.raises(OSError, match="ape"):
        make_loader(root=tmp_path)
