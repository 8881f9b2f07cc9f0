"""What the tests of the DALI loader have in common."""

from contextlib import contextmanager

import torch

from pipelines.augment import AugmentConfig, build_recipe, supervised_view
from pipelines.dali_loader import DALILoader
from pipelines.recipe import Recipe

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
SIMCLR = build_recipe(AugmentConfig(size=32))
CROP = Recipe(views=(supervised_view(AugmentConfig(size=32)),))


@contextmanager
def loaders_of(beton):
    """What makes loaders, by default DALI's over `beton`; they are closed at the end."""
    loaders = []

    def make(recipe=SIMCLR, data=beton, kind=DALILoader, **options):
        options = {"seed": 0, "global_batch_size": 8, "num_threads": 2} | options
        loaders.append(kind(data, recipe, **options))
        return loaders[-1]

    try:
        yield make
    finally:
        for loader in loaders:
            loader.close()


def assert_close(ours, theirs, *, mean, highest):
    """Same samples; pixels apart by at most `mean` in the mean of a view and `highest` at most, levels of 255."""
    assert ours.sample_indices.tolist() == theirs.sample_indices.tolist()
    assert ours.labels.tolist() == theirs.labels.tolist()
    assert ours.epoch == theirs.epoch
    for a, b in zip(ours.views, theirs.views, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.is_contiguous(memory_format=torch.channels_last)
        difference = 255 * (a - b).abs()
        assert difference.mean() <= mean
        assert difference.max() < highest + 0.01
