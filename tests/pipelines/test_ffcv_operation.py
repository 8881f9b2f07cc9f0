"""Our views through ffcv.Loader: bit-equal to our own loader's; in a process of its own, as FFCV's kernels want."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.pipelines.betons import make_beton

ROOT = Path(__file__).parents[2]
SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
COMMON = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import open_beton
from pipelines.ffcv_loader import FFCVLoader
from pipelines.ffcv_operation import MultiViewDecoder

path, output = sys.argv[1:]
beton, recipe = open_beton(Path(path)), build_recipe(AugmentConfig(recipe="byol", size=32))
decoder = MultiViewDecoder(beton, recipe, seed=7, output=output, num_threads=2)

def batches():
    loader = Loader(path, batch_size=8, num_workers=2, order=OrderOption.SEQUENTIAL, os_cache=True,
                    pipelines={"image": [decoder, ToTensor()], "label": None})
    for epoch in (3, 4):
        decoder.set_epoch(epoch)
        for (views,) in loader:
            yield epoch, views.clone()
"""


def run(code, *arguments):
    command = [sys.executable, "-c", COMMON + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("output", ["crops", "views"])
def test_views_through_ffcvs_loader_are_bit_equal_to_ours(tmp_path, output):
    beton = make_beton(tmp_path, SIZES)
    code = """
    ours = FFCVLoader(beton, recipe, seed=7, global_batch_size=8, num_threads=1, training=False, output=output)
    theirs = list(batches())
    assert len(theirs) == 6, len(theirs)
    for epoch, views in theirs:
        assert views.shape == (8, 2, 32, 32, 3), views.shape
    for (epoch, views), batch in zip(theirs, [*ours.epoch(3), *ours.epoch(4)], strict=True):
        assert batch.epoch == epoch
        for v in range(2):
            assert torch.equal(views[:, v].permute(0, 3, 1, 2), batch.views[v])
    print("equal")
    """
    result = run(code, beton.path, output)
    assert result.stdout.strip() == "equal", result.stderr


def test_a_corrupt_sample_is_named_and_ends_the_loop(tmp_path):
    path = make_beton(tmp_path, SIZES).path
    code = """
    import os
    start = int(beton.offsets[13])
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(bytes(200))
    os.utime(path, ns=(0, beton.stamps[0].written_ns))  # as a failing disk leaves it
    try:
        print(len(list(batches())))
    except KeyboardInterrupt:
        print("interrupted")
    sys.stdout.flush()
    os._exit(0)
    """
    result = run(code, path, "crops")
    assert result.stdout.strip() == "interrupted", result.stderr
    assert "sample 13 (" in result.stderr


def test_views_of_several_sizes_are_refused(tmp_path):
    code = """
    try:
        MultiViewDecoder(beton, build_recipe(AugmentConfig(recipe="dino", size=32, local_size=24)))
    except ValueError as error:
        print(error)
    """
    result = run(code, make_beton(tmp_path, SIZES).path, "crops")
    assert result.stdout.strip() == "`recipe` must have views of one size for ffcv.Loader, got [24, 32]; use FFCVLoader"
