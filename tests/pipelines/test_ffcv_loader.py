"""The loader: the same views on any number of ranks and threads, from any start; bad samples by name."""

import inspect
import io
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from native.compiled import source_hash
from pipelines.augment import AugmentConfig, build_recipe, center_recipe
from pipelines.beton import open_beton
from pipelines.decode.kernel import SOURCES as KERNEL_SOURCES
from pipelines.decode.kernel import render_kernel
from pipelines.draw import draw_views
from pipelines.ffcv_loader import FFCVLoader
from pipelines.order import epoch_order
from pipelines.photometric import reference
from pipelines.photometric.numba_kernels import SOURCES as CHAIN_SOURCES
from pipelines.photometric.numba_kernels import batch_kernel
from pipelines.recipe import Recipe, ViewRecipe
from tests.pipelines.betons import make_beton, natural_image

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
SIMCLR = build_recipe(AugmentConfig(size=32))


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    return make_beton(tmp_path_factory.mktemp("set"), SIZES)


@pytest.fixture
def make_loader(beton):
    loaders = []

    def make(recipe=SIMCLR, data=beton, **options):
        options = {"seed": 0, "global_batch_size": 8, "num_threads": 2} | options
        loaders.append(FFCVLoader(data, recipe, **options))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def assert_same(ours, theirs):
    assert (ours.sample_indices == theirs.sample_indices).all()
    assert (ours.labels == theirs.labels).all()
    assert ours.epoch == theirs.epoch
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert torch.equal(a, b)


def concatenate(parts):
    return [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_ranks_and_threads_do_not_change_the_views(make_loader, world_size, num_threads):
    whole = list(make_loader(num_threads=1).epoch(5))
    ranks = [
        make_loader(rank=rank, world_size=world_size, num_threads=num_threads).epoch(5) for rank in range(world_size)
    ]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert torch.cat([part.sample_indices for part in parts]).tolist() == expected.sample_indices.tolist()
        for ours, theirs in zip(concatenate(parts), expected.views, strict=True):
            assert torch.equal(ours, theirs)


def test_a_restarted_epoch_goes_on_with_the_same_batches(make_loader):
    whole = list(make_loader().epoch(2))
    for ours, theirs in zip(make_loader().epoch(2, start_batch=1), whole[1:], strict=True):
        assert_same(ours, theirs)


def test_a_batch_is_decode_crop_and_chain_by_others(make_loader, beton):
    # Pillow decodes, torchvision crops and flips, the float64 reference chain colours.
    batch = next(make_loader(seed=4).epoch(3))
    samples = epoch_order(4, 3, beton.num_samples)[:8]
    assert batch.sample_indices.tolist() == samples.tolist()
    assert batch.labels.tolist() == [int(s) * 2 // len(SIZES) for s in samples]
    params = draw_views(SIMCLR, 4, 3, samples, beton.widths[samples], beton.heights[samples])
    for v, view in enumerate(SIMCLR.views):
        assert batch.views[v].shape == (8, 3, 32, 32)
        assert batch.views[v].is_contiguous(memory_format=torch.channels_last)
        crops = []
        for p, sample in zip(params[:, v], samples, strict=True):
            image = np.array(Image.open(io.BytesIO(beton.encoded(int(sample)))).convert("RGB"))
            x = torch.from_numpy(image).permute(2, 0, 1).double()
            window = [int(p[name]) for name in ("top", "left", "height", "width")]
            x = F.resized_crop(x, *window, [32, 32], antialias=True)
            crops.append((x.flip(-1) if p["flip"] else x).round().to(torch.uint8))
        expected = reference.photometric(torch.stack(crops), params[:, v], view, SIMCLR, torch.float64)
        difference = (batch.views[v].double() - expected).abs()
        # A pixel may round to its other neighbour: one level, which the contrast and saturation can amplify.
        assert difference.mean() < 2e-4
        assert difference.max() < 5 / 255


@pytest.mark.parametrize("recipe", ["simclr", "dino"])
@pytest.mark.parametrize("encode", ["jpeg", "raw"])
def test_the_way_of_a_gpu_holds_the_same_views_as_a_cpu_batch(make_loader, tmp_path, recipe, encode):
    # Whole images from the threads; crops and colours on the device, which is the CPU here.
    data = make_beton(tmp_path, SIZES, encode=encode)
    local = {"local_size": 24, "local_views": 2} if recipe == "dino" else {}
    recipe = build_recipe(AugmentConfig(recipe=recipe, size=32, **local))
    crops = make_loader(recipe, data, output="crops")
    on_device = make_loader(recipe, data, output="crops", geometry="device")
    colored = make_loader(recipe, data, geometry="device")
    for a, b, c, d in zip(*(x.epoch(0) for x in (crops, on_device, colored, make_loader(recipe, data))), strict=True):
        for crop, other, view, expected in zip(a.views, b.views, c.views, d.views, strict=True):
            assert crop.dtype == other.dtype == torch.uint8
            assert (crop.int() - other.int()).abs().max() <= 1
            assert ((crop.int() - other.int()) != 0).double().mean() < 5e-3  # ties
            assert (view - expected).abs().mean() < 1e-3
        assert (c.sample_indices == d.sample_indices).all()
        assert (c.labels == d.labels).all()


def test_raw_and_jpeg_betons_draw_the_same_windows(make_loader, beton, tmp_path):
    raw = make_beton(tmp_path, SIZES, encode="raw")
    recipe = Recipe(views=(ViewRecipe(size=32),))
    for a, b in zip(make_loader(recipe).epoch(0), make_loader(recipe, raw).epoch(0), strict=True):
        assert (a.sample_indices == b.sample_indices).all()
        assert (a.views[0] - b.views[0]).abs().mean() < 0.02  # what q90 and chroma subsampling lose


def test_views_may_have_sizes_of_their_own(make_loader):
    small, large = ViewRecipe(size=24, flip_prob=0.5), ViewRecipe(size=40, blur_prob=1.0)
    both = next(make_loader(Recipe(views=(small, large, small))).epoch(0))
    assert [tuple(view.shape) for view in both.views] == [(8, 3, 24, 24), (8, 3, 40, 40), (8, 3, 24, 24)]
    alone = next(make_loader(Recipe(views=(small,))).epoch(0))
    assert torch.equal(both.views[0], alone.views[0])
    assert not torch.equal(both.views[0], both.views[2])


def test_evaluation_keeps_order_and_the_partial_batch(make_loader):
    loader = make_loader(center_recipe(AugmentConfig(size=32)), global_batch_size=10, training=False)
    batches = list(loader.epoch(0))
    assert len(loader) == len(batches) == 3
    assert torch.cat([b.sample_indices for b in batches]).tolist() == list(range(24))
    assert [b.num_images for b in batches] == [10, 10, 4]


def test_training_drops_the_partial_batch(make_loader):
    loader = make_loader(global_batch_size=10)
    assert len(loader) == len(list(loader.epoch(0))) == 2


def test_batches_are_not_overwritten_by_later_ones(make_loader):
    loader = make_loader(batches_ahead=1, global_batch_size=4)
    kept, copies = [], []
    for batch in loader.epoch(0):
        kept.append(batch.views[0])
        copies.append(batch.views[0].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_leaving_an_epoch_early_leaves_nothing_behind(make_loader):
    before = threading.active_count()
    loader = make_loader()
    for _ in range(3):
        for _batch in loader.epoch(0):
            break
    assert_same(next(loader.epoch(1)), next(make_loader().epoch(1)))
    loader.close()
    assert threading.active_count() <= before + 2  # the other loader's two threads


def test_bfloat16_views_are_the_rounded_float32_ones(make_loader):
    half, full = next(make_loader(dtype=torch.bfloat16).epoch(0)), next(make_loader().epoch(0))
    assert half.views[0].dtype == torch.bfloat16
    assert torch.equal(half.views[0], full.views[0].bfloat16())


def test_the_position_follows_the_batches_taken(make_loader):
    loader = make_loader()
    batches = loader.epoch(4)
    next(batches)
    next(batches)
    state = loader.state_dict()
    assert (state["epoch"], state["next_batch"]) == (4, 2)
    assert make_loader().load_state_dict(state) == (4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` 1, this run has 0"),
        ({"global_batch_size": 4}, "`global_batch_size` 4, this run has 8"),
        ({"num_samples": 99}, "`num_samples` 99, this run has 24"),
        ({"dataset": "other"}, "`dataset` other, this run has"),
    ],
)
def test_a_state_of_another_run_is_refused(make_loader, change, message):
    loader = make_loader()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(loader.state_dict() | change)


def damage(beton, sample, folder):
    """A copy of the file in which one JPEG is cut off in the middle (its rest is zeros)."""
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    path = folder / beton.path.name
    path.write_bytes(data)
    (folder / (path.name + ".json")).write_bytes((beton.path.parent / (path.name + ".json")).read_bytes())
    return open_beton(path)


def test_a_sample_that_cannot_be_decoded_stops_the_run_by_name(make_loader, beton, tmp_path):
    loader = make_loader(data=damage(beton, 13, tmp_path))
    with pytest.raises(ValueError, match=r"sample 13 \(class1/0013.png\) of .*set.beton cannot be decoded: .*JPEG"):
        list(loader.epoch(0))
    with pytest.raises(ValueError, match="sample 13"):  # and again: no thread died of it
        list(loader.epoch(0))


def test_a_sample_that_cannot_be_decoded_is_named_counted_and_replaced(make_loader, beton, tmp_path, caplog):
    loader = make_loader(data=damage(beton, 13, tmp_path), on_error="skip")
    with caplog.at_level(logging.WARNING):
        batches = list(loader.epoch(0))
    assert loader.num_skipped == 1
    assert "sample 13 (class1/0013.png)" in caplog.text
    indices = torch.cat([batch.sample_indices for batch in batches]).tolist()
    assert sorted(indices) == sorted([i for i in range(24) if i != 13] + [14])
    good = list(make_loader().epoch(0))
    for ours, theirs in zip(batches, good, strict=True):
        for i, sample in enumerate(ours.sample_indices.tolist()):
            if sample != 14:
                assert torch.equal(ours.views[1][i], theirs.views[1][i])
    stand_ins = [b.views[0][i] for b in batches for i, s in enumerate(b.sample_indices.tolist()) if s == 14]
    assert torch.equal(stand_ins[0], stand_ins[1])


@pytest.mark.parametrize("target", [{}, {"output": "crops", "geometry": "device"}])
def test_a_jpeg_cut_off_and_closed_again_is_refused_though_its_restart_markers_help_the_decoder_on(
    make_loader, beton, tmp_path, target
):
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[13]), int(beton.sizes[13])
    data[start + size // 2 : start + size] = bytes(size - size // 2 - 2) + b"\xff\xd9"
    path = tmp_path / "cut.beton"
    path.write_bytes(data)
    whole = Recipe(views=(ViewRecipe(size=32, crop="whole"),))
    with pytest.raises(ValueError, match=r"sample 13 .*cannot be decoded"):
        list(make_loader(whole, open_beton(path), **target).epoch(0))


def test_an_error_is_raised_in_its_batchs_turn(make_loader, beton, tmp_path):
    loader = make_loader(data=damage(beton, 13, tmp_path), training=False, num_threads=1)
    batches = loader.epoch(0)
    good = next(batches)
    assert good.sample_indices.tolist() == list(range(8))
    with pytest.raises(ValueError, match="sample 13"):
        next(batches)


def test_a_file_of_bad_samples_stops_even_when_skipping(make_loader, tmp_path):
    raw = natural_image(8, 8, 0)
    folder = tmp_path / "bad"
    folder.mkdir()
    bad = make_beton(folder, [raw.size] * 20)
    data = bytearray(bad.path.read_bytes())
    for start, size in zip(bad.offsets.tolist(), bad.sizes.tolist(), strict=True):
        data[start : start + size] = bytes(size)
    bad.path.write_bytes(data)
    loader = make_loader(data=open_beton(bad.path), on_error="skip")
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(loader.epoch(0))


def junk_before_first_table(jpeg):
    """Three bytes that belong to no segment, after the first one: libjpeg-turbo warns while it reads the header."""
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end] + b"\1\2\3" + jpeg[end:]


def junk_before_end(jpeg):
    return jpeg[:-2] + b"\0\1" + jpeg[-2:]


def replace_sample(beton, sample, change, folder):
    """A copy of the file in which one JPEG is changed to one of at most its size (its comment makes room)."""
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[sample]), int(beton.sizes[sample])
    file = io.BytesIO()
    Image.open(io.BytesIO(data[start : start + size])).save(file, "JPEG", quality=20)
    changed = change(file.getvalue())
    assert len(changed) <= size
    data[start : start + size] = changed + bytes(size - len(changed))
    path = folder / beton.path.name
    path.write_bytes(data)
    return open_beton(path), changed


CENTER = Recipe(views=(ViewRecipe(size=20, crop="center"),))


def test_junk_before_the_end_of_a_jpeg_harms_nothing(make_loader, beton, tmp_path):
    changed, jpeg = replace_sample(beton, 7, junk_before_end, tmp_path)
    batch = next(make_loader(CENTER, changed, training=False).epoch(0))
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))).permute(2, 0, 1).double()
    side = min(image.shape[1:])
    expected = F.resized_crop(
        image, (image.shape[1] - side) // 2, (image.shape[2] - side) // 2, side, side, [20, 20], antialias=True
    )
    assert (batch.views[0][7] * 255 - expected).abs().max() < 0.51


def test_junk_before_a_header_marker_is_refused_and_shows_no_other_images_pixels(make_loader, beton, tmp_path):
    changed, _ = replace_sample(beton, 7, junk_before_first_table, tmp_path)
    with pytest.raises(ValueError, match=r"sample 7 .*cannot be decoded: .*extraneous bytes before marker"):
        next(make_loader(CENTER, changed, training=False).epoch(0))


def test_a_torn_manifest_does_not_hide_the_sample(make_loader, beton, tmp_path):
    data = damage(beton, 13, tmp_path)
    (tmp_path / "set.beton.json").write_text("{")
    with pytest.raises(ValueError, match=r"sample 13 of .*set.beton cannot be decoded"):
        list(make_loader(data=data).epoch(0))


def test_sets_of_one_shape_are_told_apart(make_loader, tmp_path):
    states = []
    for name, sizes in (("a", [(8, 8)] * 8), ("b", [(8, 8)] * 8)):
        (tmp_path / name).mkdir()
        beton = make_beton(tmp_path / name, sizes, encode="raw")
        if name == "b":
            data = bytearray(beton.path.read_bytes())
            data[int(beton.offsets[3])] ^= 255
            beton.path.write_bytes(data)
            beton = open_beton(beton.path)
        states.append(make_loader(data=beton).state_dict())
    with pytest.raises(ValueError, match="`dataset`"):
        make_loader(data=beton).load_state_dict(states[0])


def test_compiled_kernels_follow_the_code_that_is_inlined_into_them():
    # Numba's cache on disk knows only a kernel's own file; the others' content is in the kernel's closure. Every module
    # of ours whose functions the machine code was made from must be among them.
    render = render_kernel()
    batch = batch_kernel()
    for kernel, sources in ((render, KERNEL_SOURCES), (batch, CHAIN_SOURCES)):
        assert source_hash(*sources) in [cell.cell_contents for cell in kernel.py_func.__closure__]
        assert compiled_modules(kernel.py_func) <= set(sources)


def compiled_modules(function):
    """The modules of all compiled functions that `function` calls, directly or through others."""
    seen, waiting = set(), [function]
    while waiting:
        used = inspect.getclosurevars(waiting.pop())
        for value in (*used.globals.values(), *used.nonlocals.values()):
            callee = getattr(value, "py_func", None) or getattr(value, "_defn", None)
            if callee is not None and callee not in seen:
                seen.add(callee)
                waiting.append(callee)
    return {callee.__module__ for callee in seen}
