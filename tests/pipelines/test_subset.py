"""Subsets: which rows they hold, and that a loader's views of them are those that it gives of the whole set."""

import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentConfig, build_recipe
from pipelines.beton import open_beton
from pipelines.build import DataConfig, Subset, build_loader, open_data
from pipelines.manifest import load_manifest, manifest_path
from pipelines.plan import BatchPlan
from pipelines.subset import SubsetConfig, balanced_subset, choose_rows, read_names, rows_of_names
from tests.pipelines.betons import make_beton

SIZES = [(60 + 3 * i, 80 - 2 * i) for i in range(24)]
SIMCLR = build_recipe(AugmentConfig(size=32))
FILES = ["ape/1.JPEG", "ape/2.JPEG", "zebra/2.JPEG", "zebra/young/3.JPEG"]


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """24 images of 3 classes, with a manifest; their folder lies beside."""
    return make_beton(tmp_path_factory.mktemp("set"), SIZES, num_classes=3)


@pytest.fixture
def labels():
    """400 labels of the classes 0, 2, 3 and 7, of different sizes, shuffled."""
    values = torch.tensor([0] * 200 + [2] * 100 + [3] * 60 + [7] * 40)
    return values[torch.randperm(400, generator=torch.Generator().manual_seed(0))]


@pytest.fixture
def opened():
    """Makes a loader of what a `DataConfig` names; it is closed at the end."""
    loaders = []

    def make(path, *, seed=0, rank=0, world_size=1, training=True, **options):
        config = DataConfig(path=str(path), **{"global_batch_size": 4, "num_threads": 1} | options)
        common = {"device": torch.device("cpu"), "dtype": torch.float32, "num_cores": 1}
        ranks = {"seed": seed, "rank": rank, "world_size": world_size, "training": training}
        loaders.append(build_loader(config, open_data(config), SIMCLR, **ranks, **common))
        if config.loader == "folder":
            loaders[-1]._num_workers = 0  # in this process: others take seconds to start
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("per_class", [1, 5, 40])
def test_every_class_gives_the_same_number_of_rows(labels, per_class):
    rows = balanced_subset(labels, per_class, seed=3)
    assert rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert labels[rows].unique(return_counts=True)[1].tolist() == [per_class] * 4


def test_it_depends_on_the_seed_alone(labels):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = balanced_subset(labels, 5, seed=0)
    torch.manual_seed(1)
    assert torch.equal(balanced_subset(labels, 5, seed=0), first)
    assert not torch.equal(balanced_subset(labels, 5, seed=1), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_subsets_of_one_seed_are_nested(labels):
    small, large = (set(balanced_subset(labels, n, seed=4).tolist()) for n in (5, 20))
    assert small < large
    shares = [set(rows_of(labels, fraction=share, seed=4).tolist()) for share in (0.01, 0.1, 0.5)]
    assert shares[0] < shares[1] < shares[2]


def test_every_row_is_chosen_equally_often():
    labels = torch.arange(400) % 4
    counts = np.zeros(400)
    for seed in range(500):
        counts[balanced_subset(labels, 20, seed).numpy()] += 1
    # 500 draws of probability 0.2 for each of 400 rows: mean 100, deviation 8.9
    assert counts.mean() == 100
    assert abs(counts - 100).max() < 5 * 8.9
    assert 7 < counts.std() < 11


def test_the_subset_is_the_same_on_every_machine():
    assert balanced_subset(torch.arange(20) % 2, 3, seed=0).tolist() == [1, 4, 5, 13, 16, 18]


def test_too_small_a_class_is_named(labels):
    with pytest.raises(ValueError, match=r"must be between 1 and 40, the size of class 7, got 41; ask for fewer"):
        balanced_subset(labels, 41, seed=0)
    with pytest.raises(ValueError, match="must be between 1 and 40"):
        balanced_subset(labels, 0, seed=0)


def rows_of(labels, files=None, **options):
    values = None if labels is None else labels.numpy()
    return choose_rows(SubsetConfig(**options), values, files, 400 if labels is None else len(labels))


@pytest.mark.parametrize(
    ("fraction", "counts"),
    [(0.01, [2, 1, 1, 1]), (0.025, [5, 3, 2, 1]), (0.1, [20, 10, 6, 4]), (1.0, [200, 100, 60, 40])],
)
def test_a_fraction_takes_its_share_of_every_class(labels, fraction, counts):
    rows = rows_of(labels, fraction=fraction)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert np.unique(labels.numpy()[rows], return_counts=True)[1].tolist() == counts  # 2.5 → 3, 0.4 → 1


def test_a_fraction_and_a_number_of_each_class_take_the_same_rows():
    labels = torch.arange(400) % 4
    assert rows_of(labels, fraction=0.05, seed=2).tolist() == rows_of(labels, per_class=5, seed=2).tolist()


def test_a_set_without_labels_is_one_class():
    assert len(rows_of(None, fraction=0.1)) == 40
    with pytest.raises(ValueError, match="`per_class` of a subset needs labels, which the set lacks; take a"):
        rows_of(None, per_class=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"`fraction` of a subset must be in \(0, 1\], got 0.0; one percent is 0.01"),
        ({"fraction": 1.5}, "must be in"),
        ({"fraction": float("nan")}, "must be in"),
        ({"per_class": 0}, "`per_class` of a subset must be at least 1, got 0"),
        ({"fraction": 0.1, "list": "a.txt"}, "must be given by list, fraction or per_class, got list and fraction"),
        ({"seed": 1}, "`seed` of a subset needs its `fraction` or `per_class`, got 1 alone"),
        ({"seed": -1, "fraction": 0.1}, "must not be negative"),
    ],
)
def test_what_makes_no_subset_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SubsetConfig(**options)


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["1.JPEG"], [0]),
        (["3.JPEG", "1.JPEG"], [0, 3]),
        (["zebra/2.JPEG", "ape/2.JPEG"], [1, 2]),
        (["zebra/young/3.JPEG"], [3]),
    ],
)
def test_images_are_found_by_path_or_by_name(names, rows):
    assert rows_of_names(names, FILES).tolist() == rows


def test_a_name_that_is_also_a_path_means_the_path():
    assert rows_of_names(["2.JPEG"], ["ape/2.JPEG", "2.JPEG"]).tolist() == [1]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.JPEG", "9.JPEG"], "1 of the 2 names in the list names no image of the set: '9.JPEG'$"),
        (
            [f"{i}.png" for i in range(5)],
            "5 of the 5 names in .* name no image .*: '0.png', '1.png', '2.png', …$",
        ),
        (["2.JPEG"], "1 of the 1 names in the list is the name of several images: '2.JPEG'; name each by its path"),
        (["1.JPEG", "ape/1.JPEG"], "1 of the 2 names in the list names an image again: 'ape/1.JPEG'; name each once"),
        (["young/3.JPEG"], "names no image"),
    ],
)
def test_names_that_do_not_tell_one_image_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        rows_of_names(names, FILES)


def test_a_list_is_read_whatever_its_line_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("﻿a 1.JPEG\r\n\r\n  b.JPEG \nc.JPEG".encode())
    assert read_names(path) == ["a 1.JPEG", "b.JPEG", "c.JPEG"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"must name at least one image, .*list.txt is empty"):
        read_names(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a text file with one file name a line"):
        read_names(path)
    with pytest.raises(ValueError, match=r"`list` of a subset must be a text file, there is no .*absent.txt"):
        read_names(tmp_path / "absent.txt")


def test_a_list_needs_a_manifest(beton, tmp_path):
    (tmp_path / "plain.beton").write_bytes(beton.path.read_bytes())
    (tmp_path / "list.txt").write_text("0003.png")
    config = DataConfig(path=str(tmp_path / "plain.beton"), subset=SubsetConfig(list=str(tmp_path / "list.txt")))
    with pytest.raises(ValueError, match=r"needs the names of the images, .* convert the images with"):
        open_data(config)
    manifest_path(tmp_path / "plain.beton").write_text(load_manifest(beton.path).to_json())
    assert open_data(config).rows.tolist() == [3]


KINDS = ["ffcv", "dali", "resident", "folder"]


def batches_of(loader, epoch=1):
    return list(loader.epoch(epoch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_views_of_a_sample_do_not_depend_on_the_subset(beton, opened, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    path = beton.path.parent / "images" if kind == "folder" else beton.path
    subset = SubsetConfig(fraction=0.5, seed=3)
    rows = choose_rows(subset, beton.labels, None, 24)
    ours = batches_of(opened(path, loader=kind, subset=subset))
    whole = batches_of(opened(path, loader=kind))
    expected = {int(i): [v[n] for v in b.views] for b in whole for n, i in enumerate(b.sample_indices)}
    taken = torch.cat([batch.sample_indices for batch in ours])
    assert sorted(taken.tolist()) == rows.tolist()
    assert taken.tolist() != rows.tolist()
    for batch in ours:
        assert batch.labels.tolist() == beton.labels[batch.sample_indices.numpy()].tolist()
        for n, sample in enumerate(batch.sample_indices.tolist()):
            for view, theirs in zip(batch.views, expected[sample], strict=True):
                assert torch.equal(view[n], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_takes_every_row_once_in_order_on_all_ranks(beton, opened, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    path = beton.path.parent / "images" if kind == "folder" else beton.path
    options = {"loader": kind, "subset": SubsetConfig(per_class=3), "training": False}
    whole = [batch.sample_indices.tolist() for batch in batches_of(opened(path, **options))]
    assert list(chain(*whole)) == choose_rows(SubsetConfig(per_class=3), beton.labels, None, 24).tolist()
    ranks = [batches_of(opened(path, rank=rank, world_size=2, **options)) for rank in range(2)]
    shares = [list(chain(*(part.sample_indices.tolist() for part in parts))) for parts in zip(*ranks, strict=True)]
    assert shares == whole


def test_a_stand_in_comes_from_the_subset(beton, opened, tmp_path, caplog):
    rows = choose_rows(SubsetConfig(fraction=0.5, seed=3), beton.labels, None, 24)
    bad = next(int(row) for row in rows if row + 1 not in rows and row < 22)
    data = bytearray(beton.path.read_bytes())
    start, size = int(beton.offsets[bad]), int(beton.sizes[bad])
    data[start : start + size] = bytes(size)
    (tmp_path / "bad.beton").write_bytes(data)
    expected = int(rows[(rows.tolist().index(bad) + 1) % len(rows)])
    for kind in ("ffcv", "resident"):
        loader = opened(tmp_path / "bad.beton", loader=kind, subset=SubsetConfig(fraction=0.5, seed=3), on_error="skip")
        taken = torch.cat([batch.sample_indices for batch in batches_of(loader)]).tolist()
        assert sorted(taken) == sorted([*(int(row) for row in rows if row != bad), expected])
    assert f"sample {expected} stands in for it" in caplog.text


def test_a_resident_subset_holds_its_pixels_alone(beton, opened):
    loader = opened(beton.path, loader="resident", subset=SubsetConfig(per_class=2))
    rows = loader._rows
    assert loader._set.pixels.numel() == 3 * int((beton.widths[rows].astype(int) * beton.heights[rows]).sum())


def plan(rows=None, **options):
    common = {"num_samples": 24, "fingerprint": "f", "seed": 0, "global_batch_size": 4, "rank": 0, "world_size": 1}
    return BatchPlan(**common | {"training": True, "rows": rows} | options)


def test_a_plan_knows_its_subset():
    ours, other = np.array([1, 5, 7, 8, 20]), np.array([1, 5, 7, 8, 21])
    state = plan(ours).state_dict()
    assert plan(ours.copy()).load_state_dict(state) == (0, 0)
    for rows in (other, None):
        with pytest.raises(ValueError, match=r"was made with `subset` [0-9a-f]{8}, this run has"):
            plan(rows).load_state_dict(state)
    with pytest.raises(ValueError, match=r"was made with `subset` None, this run has [0-9a-f]{8}"):
        plan(ours).load_state_dict(plan().state_dict())
    assert (plan(ours).num_samples, len(plan(ours)), len(plan(ours, training=False))) == (5, 1, 2)


def test_a_state_from_before_there_were_subsets_goes_on_with_the_whole_set():
    state = plan().state_dict()
    del state["subset"]
    assert plan().load_state_dict(state) == (0, 0)
    with pytest.raises(ValueError, match="`subset` None"):
        plan(np.array([1, 2, 3, 4])).load_state_dict(state)


def test_a_batch_must_fit_into_the_subset(beton, opened):
    with pytest.raises(ValueError, match="must not exceed the 6 images that are trained on, got 8; use"):
        opened(beton.path, subset=SubsetConfig(per_class=2), global_batch_size=8)
    assert open_data(DataConfig(path=str(beton.path), subset=SubsetConfig(per_class=2))).num_samples == 6
    assert not isinstance(open_data(DataConfig(path=str(beton.path))), Subset)


def test_unlabelled_rows_are_a_class_of_their_own(beton):
    unlabelled = dataclasses.replace(open_beton(beton.path), labels=None)
    assert len(choose_rows(SubsetConfig(fraction=0.25), unlabelled.labels, None, 24)) == 6


@pytest.mark.parametrize("kind", ["ffcv", "resident", "folder"])
def test_images_without_their_label_are_the_same_images(beton, opened, kind):
    path = beton.path.parent / "images" if kind == "folder" else beton.path
    labelled = SubsetConfig(per_class=2, seed=1)
    rows = choose_rows(labelled, beton.labels, None, 24)
    loader, plain = opened(path, loader=kind, labelled=labelled), opened(path, loader=kind)
    for ours, theirs in zip(batches_of(loader), batches_of(plain), strict=True):
        expected = np.where(np.isin(ours.sample_indices, rows), theirs.labels, -1)
        assert ours.labels.tolist() == expected.tolist()
        assert torch.equal(ours.sample_indices, theirs.sample_indices)
        assert torch.equal(ours.views[1], theirs.views[1])
    with pytest.raises(ValueError, match="`dataset`"):
        plain.load_state_dict(loader.state_dict())


def test_a_subset_is_drawn_by_labels_that_are_then_hidden(beton):
    options = {"subset": SubsetConfig(per_class=4), "labelled": SubsetConfig(per_class=1)}
    data = open_data(DataConfig(path=str(beton.path), **options))
    assert (data.num_samples, (data.whole.labels >= 0).sum()) == (12, 3)
    assert set(np.flatnonzero(data.whole.labels >= 0)) < set(data.rows.tolist())  # nested, as of one seed
