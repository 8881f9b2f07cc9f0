"""Studies as grids: which cells there are, what they change, and what the paper says of them."""

import math
import statistics

import pytest

from tools.study_catalogue import CATALOGUE
from tools.study_cells import TRANSFORMATIONS, supervised_cells
from tools.study_grid import ACCURACY, build_grid, configure
from tools.study_published import PUBLISHED
from train.config import flatten, parse_pretrain_config, resolved_dict
from train.optim.lars import peak_lr


@pytest.fixture(scope="module")
def base():
    return parse_pretrain_config(["--config", "configs/study_cifar10.yaml"])


def config_of(grid, base, row, column, seed=0):
    return configure(base, grid.at(row, column), seed=seed, runs_dir="there")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_cell_changes_what_is_studied_and_nothing_else(name, base):
    grid = build_grid(CATALOGUE[name], base)
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    for cell in grid.cells:
        ours = flatten(resolved_dict(configure(base, cell, seed=2, runs_dir="there")))
        theirs = flatten(resolved_dict(base))
        changed = {key for key in ours if ours[key] != theirs[key]} - {"name", "runs_dir", "seed"}
        assert changed <= set(cell.overrides) <= set(CATALOGUE[name].varies)
        for key, value in cell.overrides.items():
            assert ours[key] == (list(value) if isinstance(value, tuple) else value)
        assert (ours["name"], ours["runs_dir"], ours["seed"]) == ("seed2", "there", 2)


def test_a_composition_is_trained_once_for_both_its_places(base):
    grid = build_grid(CATALOGUE["composition"], base)
    assert len(grid.cells) == 7 + 21
    for row in TRANSFORMATIONS:
        for column in TRANSFORMATIONS:
            cell = grid.at(row, column)
            assert cell is grid.at(column, row)
            assert set(cell.overrides["augment.branch_transformations"]) == {row, column}
    blurred = config_of(grid, base, "rotate", "blur").augment
    assert (blurred.recipe, blurred.blur_prob) == ("one_branch", None)  # as published, though the base has none


def test_only_some_transformations_and_only_some_cells(base):
    grid = build_grid(CATALOGUE["composition"], base, rows=["crop", "color", "blur"])
    assert [cell.name for cell in grid.cells] == [
        "crop--crop", "crop--color", "crop--blur", "color--color", "color--blur", "blur--blur",
    ]  # fmt: skip
    grid = build_grid(CATALOGUE["composition"], base, patterns=["crop--*", "*--crop", "*--rotate"])
    assert len(grid.cells) == 7 + 6
    assert grid.at("color", "sobel") is None


def test_heads(base):
    grid = build_grid(CATALOGUE["head"], base, columns=["32", "128"])
    assert [cell.name for cell in grid.cells] == [
        "none--128", "linear--32", "linear--128", "non-linear--32", "non-linear--128",
    ]  # fmt: skip
    heads = [config_of(grid, base, row, "128").model.projection_head for row in ("none", "linear", "non-linear")]
    assert [head.num_layers for head in heads] == [0, 1, 2]
    assert grid.at("none", "32") is None


def test_temperatures_and_normalisation(base):
    grid = build_grid(CATALOGUE["temperature"], base, rows=["0.2", "not normalised, 10"])
    models = [config_of(grid, base, row, "top-1").model for row in grid.rows.values]
    assert [(model.temperature, model.normalize) for model in models] == [(0.2, True), (10.0, False)]


def test_both_scalings_meet_at_the_base(base):
    grid = build_grid(CATALOGUE["lr_scaling"], base)
    peak = peak_lr(base.optim, 256)
    for batch in (64, 128, 256, 512):
        linear, root = (config_of(grid, base, str(batch), rule) for rule in ("linear", "sqrt"))
        assert peak_lr(linear.optim, batch) == pytest.approx(peak * batch / 256)
        assert peak_lr(root.optim, batch) == pytest.approx(peak * math.sqrt(batch / 256))


def test_the_supervised_row_stands_below(base):
    extra = supervised_cells(["1/8", "1 (+blur)"], 10)
    grid = build_grid(CATALOGUE["color"], base, columns=["1/8", "1 (+blur)"], extra=extra)
    assert grid.rows.values == ("SimCLR", "supervised")
    config = config_of(grid, base, "supervised", "1 (+blur)")
    assert (config.model.method, config.model.classifier.num_classes) == ("supervised", 10)
    assert (config.augment.color_strength, config.augment.blur_prob) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("composition", {"rows": ["crop", "zoom"]}, "a transformation of composition must be one of crop, .*'zoom'"),
        ("composition", {"columns": ["crop"]}, "`columns` must be left out for composition"),
        ("temperature", {"rows": ["hot"]}, "a temperature must be a positive number, got 'hot'"),
        ("temperature", {"rows": ["-1"]}, "a temperature must be a positive number, got '-1'"),
        ("temperature", {"patterns": ["9*"]}, "`cells` must match a cell of temperature, .*there are 0.05, 0.1"),
        ("losses", {"rows": ["Hinge"]}, "a loss must be one of NT-Xent, .*got 'Hinge'"),
        ("width", {"rows": ["11"]}, "cell 11--.*`model.encoder.depth` must be one of"),
        ("batch_epochs", {"rows": ["12.5"]}, "a batch size must be a positive number, got '12.5'"),
    ],
)
def test_labels_that_mean_nothing_are_named(name, options, complaint, base):
    with pytest.raises(ValueError, match=complaint):
        build_grid(CATALOGUE[name], base, **options)


def test_the_published_matrix_agrees_with_its_own_averages():
    published = PUBLISHED["composition"]
    for row in TRANSFORMATIONS:
        mean = statistics.fmean(published.at(row, column) for column in TRANSFORMATIONS)
        assert published.at(row, "average") == pytest.approx(mean, abs=0.06)  # of rounded numbers, rounded


def test_published_numbers_stand_at_places_that_are_measured(base):
    assert PUBLISHED.keys() == CATALOGUE.keys()
    for name in ("color", "transform_prediction", "losses", "temperature", "composition"):
        grid = build_grid(CATALOGUE[name], base)
        for cell in grid.cells:
            assert PUBLISHED[name].at(cell.row, cell.column, CATALOGUE[name].figures[0]) is not None, cell
    assert PUBLISHED["batch_epochs"].at("256", "800") == 66.6
    assert PUBLISHED["lr_scaling"].at("256", "sqrt", ACCURACY) == 62.8
