"""The peers of the input pipeline do the work that they are said to do: batches of the right kind."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench_pipelines import CONTESTANTS, WORKS
from benchmarks.conftest import OPTIONAL_MODULES
from benchmarks.contestant import PRELOADED
from benchmarks.peers.jpeg_decode import jpeg_decode
from benchmarks.peers.stored_images import TwoViews
from tests.benchmarks import contestants
from tests.pipelines.betons import make_beton, natural_image
from tools.convert import convert
from tools.image_encoding import EncodeOptions

COLORS = [(60, 60, 190), (60, 190, 60), (190, 60, 60), (60, 190, 190), (190, 60, 190), (190, 190, 60)]
NUM_IMAGES = 48
BATCH_SIZE = 8


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_a_stored_image_is_decoded_as_it_is(tmp_path, kind, encode):
    beton = make_beton(tmp_path, [(40, 30), (31, 50)], encode=encode)
    image = TwoViews(beton, kind, lambda image: image)[1]
    assert tuple(image.size if kind == "pil" else image.shape) == ((31, 50) if kind == "pil" else (3, 50, 31))
    pixels = np.asarray(image) if kind == "pil" else image.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels.mean((0, 1)), np.asarray(natural_image(31, 50, 1)).mean((0, 1)), atol=1.5)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_makes_two_views_of_the_images(tmp_path, name):
    if name in OPTIONAL_MODULES:
        pytest.importorskip(OPTIONAL_MODULES[name], reason=f"{name} needs requirements-bench.txt")
    colored = {"raw": colored_images(tmp_path / "raw", 32), "jpeg": colored_images(tmp_path / "jpeg", 96)}
    works = {
        work.name: (colored["raw" if work.name == "simclr32" else "jpeg"], work.augment)
        for work in WORKS
        if name in work.contestants
    }
    if "simclr224" in works:
        noise, augment = noise_images(tmp_path / "noise"), works["simclr224"][1]
        works |= {"blurred": (noise, augment), "sharp": (noise, replace(augment, blur=False))}
    views = views_in_a_process(tmp_path / "views.npz", name, works)
    for work, (first, second) in views.items():
        size = works[work][1].size
        assert first.shape == second.shape == (NUM_IMAGES, 3, size, size)
        assert not (first == second).all((1, 2, 3)).any()
        if work == "crop224":
            check_crops(first, second)
        elif work in ("simclr224", "simclr32"):
            check_colors(np.concatenate([first, second]))
    if "blurred" in views:
        # Half of the views lose detail; what detail there is depends on the crop's scale alone, not on the jitter.
        assert detail(np.concatenate(views["blurred"])) < 0.85 * detail(np.concatenate(views["sharp"]))


def check_crops(first, second):
    views = np.concatenate([first, second])
    assert views.dtype == np.uint8
    # Half of them are flipped (48 of 96, σ = 4.9): the images grow brighter from left to right.
    rising = views[..., -50:].mean((1, 2, 3)) > views[..., :50].mean((1, 2, 3))
    assert 25 <= rising.sum() <= 71
    # The mean colour of a view is that of one image, the same for both views, and every image is there.
    distances = np.abs(views.mean((2, 3))[:, None] - np.array(COLORS)).max(-1)
    assert distances.min(1).max() < 30
    rows, rows_again = np.split(distances.argmin(1), 2)
    np.testing.assert_array_equal(rows, rows_again)
    assert set(rows) == set(range(len(COLORS)))


def check_colors(views):
    assert views.dtype == np.float32
    assert 0 <= views.min() < views.max() <= 1 + 1e-6  # the weights of a blur sum to 1 in rounding
    # Jitter moves each view, and hardly their mean. A fifth is gray (19 of 96, σ = 3.9).
    assert abs(views.mean() - np.mean(COLORS) / 255) < 0.08
    assert views.mean((1, 2, 3)).std() > 0.08
    assert 3 <= (np.ptp(views, axis=1) < 0.02).all((1, 2)).sum() <= 39


def detail(views):
    """Mean difference between neighbours, as a share of a view's contrast."""
    return (np.abs(np.diff(views, axis=-1)).mean((1, 2, 3)) / views.std((1, 2, 3))).mean()


def colored_images(folder, side):
    """Images of one colour each, which grow brighter from left to right, with some noise."""
    rng = np.random.default_rng(0)
    brighter = np.linspace(-25, 25, side)[None, :, None]
    return stored(folder, [color + brighter + rng.normal(0, 3, (side, side, 1)) for color in np.array(COLORS)])


def noise_images(folder):
    rng = np.random.default_rng(0)
    return stored(folder, [rng.normal(128, 40, (500, 500, 1)).repeat(3, -1) for _ in range(8)])


def stored(folder, images):
    """A `.beton` without labels: raw for small images, else JPEGs."""
    folder.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    encode = "raw" if images[0].shape[0] <= 32 else "jpeg"
    convert(folder, folder.with_suffix(".beton"), EncodeOptions(encode=encode), workers=1)
    return folder.with_suffix(".beton")


def views_in_a_process(path, name, works):
    """A process of its own for each contestant, as in the benchmarks, and for the same reasons."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    arguments = {work: (beton, augment, BATCH_SIZE, 2) for work, (beton, augment) in works.items()}
    target = contestants.save_views
    process = context.Process(target=target, args=(path, CONTESTANTS[name], arguments, NUM_IMAGES))
    process.start()
    process.join(120)
    process.kill()  # in case it hangs
    assert process.exitcode == 0
    saved = np.load(path)
    return {work: (saved[f"{work}.0"], saved[f"{work}.1"]) for work in works}


def test_the_bare_decoder_decodes_and_refuses(tmp_path):
    beton = make_beton(tmp_path, [(40, 30), (31, 50), (64, 64)])
    jpeg_decode(beton.path, 2)(8)
    data = np.fromfile(beton.path, np.uint8)
    data[beton.offsets[1] : beton.offsets[1] + 100] = 0
    data.tofile(beton.path)
    with pytest.raises(ValueError, match=r"sample 1 of .* cannot be decoded: .*JPEG"):
        jpeg_decode(beton.path, 2)(8)
