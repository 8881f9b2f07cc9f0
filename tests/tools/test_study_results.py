"""Tables and figures from recorded cells, against numbers worked out elsewhere."""

import csv
import io
import itertools
import statistics
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from tests.tools.study_records import write_record, write_records
from tools.study_catalogue import CATALOGUE
from tools.study_cells import TRANSFORMATIONS
from tools.study_figure import draw
from tools.study_grid import build_grid
from tools.study_published import PUBLISHED
from tools.study_records import records_of, trials_of
from tools.study_results import collect, measured_at, to_csv
from tools.study_scale import scaled_down
from tools.study_table import to_markdown
from train.config import parse_pretrain_config

ABOUT = {
    "protocol": "knn",
    "num_seeds": 1,
    "guess": "10.0",
    "scaled_down": [["epochs", "100", "3"]],
    "command": "python -m tools.study …",
}


@pytest.fixture(scope="module")
def base():
    return parse_pretrain_config(["--config", "configs/study_cifar10.yaml"])


def result_of(grid, out, num_seeds=1, num_test=1000, random=None):
    records = records_of(grid, num_seeds, out, "knn")
    return collect(grid, records, random, num_test) | ABOUT | {"num_seeds": num_seeds}


def rows_of(markdown, after=""):
    """The cells of the first table after some words."""
    lines = markdown[markdown.index(after) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_over_seeds_mean_deviation_and_students_interval(tmp_path, base):
    grid = build_grid(CATALOGUE["temperature"], base, rows=["0.1", "0.5"])
    values = {"0.1": [0.51, 0.55, 0.5], "0.5": [0.4, 0.41, 0.45]}
    write_records(grid, tmp_path, lambda cell, seed: values[cell.row][seed], num_seeds=3)
    result = result_of(grid, tmp_path, num_seeds=3)
    for row, accuracies in values.items():
        figure = measured_at(result, row, "top-1", "accuracy")
        error = np.std(accuracies, ddof=1) / np.sqrt(3)
        expected = scipy.stats.t.interval(0.95, 2, loc=np.mean(accuracies), scale=error)
        assert figure["mean"] == pytest.approx(np.mean(accuracies))
        assert figure["std"] == pytest.approx(np.std(accuracies, ddof=1))
        assert figure["interval"] == pytest.approx(expected)
        assert figure["interval_over"] == "seeds"
    low, high = (100 * bound for bound in measured_at(result, "0.1", "top-1", "accuracy")["interval"])
    table = rows_of(to_markdown(result))
    assert table[0] == ["temperature", "top-1", "contrastive accuracy", "top-1, paper", "contrastive accuracy, paper"]
    assert table[2] == ["0.1", f"52.0 ± 2.6 [{low:.1f}, {high:.1f}]", "", "64.4", "87.8"]


def test_of_one_seed_the_interval_of_the_test_set(tmp_path, base):
    grid = build_grid(CATALOGUE["losses"], base, rows=["NT-Xent"])
    (trial,) = trials_of(grid, 1, tmp_path)
    write_record(trial, accuracy=0.625, contrastive_accuracy=0.25)
    result = result_of(grid, tmp_path, num_test=1000)
    figure = measured_at(result, "NT-Xent", "top-1", "accuracy")
    wilson = scipy.stats.binomtest(625, 1000).proportion_ci(method="wilson")
    assert figure["interval"] == pytest.approx([wilson.low, wilson.high])
    assert figure["interval_over"] == "test set"
    assert measured_at(result, "NT-Xent", "top-1", "contrastive_accuracy")["interval"] is None


def test_the_composition_matrix_is_the_papers_figure(tmp_path, base):
    grid = build_grid(CATALOGUE["composition"], base)
    published = PUBLISHED["composition"]

    def accuracy(cell, _):
        return (published.at(cell.row, cell.column) + published.at(cell.column, cell.row)) / 200

    write_records(grid, tmp_path, accuracy)
    result = result_of(grid, tmp_path, random={"cell": "crop--crop", "figures": {"accuracy": 0.2}})
    assert result["order"] == {"spearman": pytest.approx(1.0), "cells": 28}
    markdown = to_markdown(result)
    measured, paper = (rows_of(markdown, title) for title in ("## Measured", "## Published"))
    crop = [accuracy(grid.at("crop", other), 0) for other in TRANSFORMATIONS]
    assert measured[0][1:] == [*TRANSFORMATIONS, "average"]
    assert [float(cell) for cell in measured[2][1:8]] == pytest.approx([100 * x for x in crop], abs=0.051)
    assert float(measured[2][8]) == pytest.approx(100 * statistics.fmean(crop), abs=0.051)
    assert [row[1] for row in measured[2:]] == [measured[2][k] for k in range(1, 8)]  # its own mirror image
    assert paper[4] == ["color", "55.8", "35.5", "18.8", "21.0", "11.4", "16.5", "20.8", "25.7"]
    assert "The same network with random weights: top-1 20.0. Guessing: 10.0" in markdown


def test_an_order_that_is_the_papers_reversed(tmp_path, base):
    grid = build_grid(CATALOGUE["temperature"], base, rows=["0.05", "0.1", "0.5", "1"])
    write_records(grid, tmp_path, lambda cell, _: 1 - PUBLISHED["temperature"].at(cell.row, cell.column) / 100)
    assert result_of(grid, tmp_path)["order"] == {"spearman": pytest.approx(-1.0), "cells": 4}


def test_what_is_missing_is_said_and_left_blank(tmp_path, base):
    grid = build_grid(CATALOGUE["head"], base, columns=["32", "128"])
    for trial in trials_of(grid, 1, tmp_path):
        if trial.cell.row != "linear":
            write_record(trial, accuracy=0.5)
    markdown = to_markdown(result_of(grid, tmp_path))
    assert "**Not measured yet, or failed:** linear--32, linear--128." in markdown
    table = rows_of(markdown)
    assert table[2][1:] == ["", "50.0"]
    assert "between ± 3.1 and ± 3.1" in markdown
    assert table[3][1:] == ["", ""]


def test_csv_holds_the_same_numbers(tmp_path, base):
    grid = build_grid(CATALOGUE["batch_epochs"], base, rows=["64", "256"], columns=["100", "3"])
    write_records(grid, tmp_path, lambda cell, _: int(cell.row) / 1024)
    lines = list(csv.DictReader(io.StringIO(to_csv(result_of(grid, tmp_path)))))
    assert [(line["batch size"], line["epochs"], float(line["mean"]), line["paper"]) for line in lines] == [
        ("64", "100", 0.0625, ""), ("64", "3", 0.0625, ""), ("256", "100", 0.25, "57.5"), ("256", "3", 0.25, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["composition", "head", "temperature", "lr_scaling"])
def test_figures_show_what_was_measured(name, tmp_path, base):
    grid = build_grid(CATALOGUE[name], base)
    pictures = []
    for k, shift in enumerate((0.0, 0.2)):
        out = tmp_path / str(k)
        write_records(grid, out, lambda cell, _, shift=shift: 0.3 + shift * (cell is grid.cells[0]))
        draw(result_of(grid, out), tmp_path / f"{k}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{k}.png").convert("RGB")).astype(int))
    difference = abs(pictures[0] - pictures[1])
    assert difference[:, :780].max() > 50
    assert not difference[:, 820:].any()  # the paper's half, where it prints numbers, is the same


def test_of_cells_with_one_seed_the_table_says_whose_intervals_those_are(tmp_path, base):
    grid = build_grid(CATALOGUE["temperature"], base, rows=["0.1", "0.5"])
    for trial in trials_of(grid, 2, tmp_path)[:3]:
        write_record(trial, accuracy=0.5)
    (words,) = [line for line in to_markdown(result_of(grid, tmp_path, num_seeds=2)).splitlines() if "seed" in line]
    assert "over 2 seeds; 95 % intervals are of that mean (Student's t); of cells without ±, one seed; 95 %" in words


def test_what_was_scaled_down_is_what_the_cells_were_trained_with(base):
    def lines(name, base, protocol="linear"):
        found = scaled_down(CATALOGUE[name], base, num_images=100, num_test=10, num_classes=2, protocol=protocol)
        return {what: (there, here) for what, there, here in found}

    sgd = replace(base, optim=replace(base.optim, name="sgd"))
    assert lines("temperature", sgd)["optimizer"][1].startswith("SGD, peak rate 3,")
    narrow = replace(base, model=replace(base.model, projection_head=replace(base.model.projection_head, out_dim=16)))
    assert lines("temperature", narrow)["projection head"] == ("2 layers to 128", "2 layers to 16")
    told = lines("transform_prediction", narrow, "transformation")
    assert not {"projection head", "evaluation"} & set(told)  # z as wide as h, and MLPs, there and here


def test_a_table_of_one_column_says_which(tmp_path, base):
    grid = build_grid(CATALOGUE["color"], base, columns=["1/4"])
    write_records(grid, tmp_path, lambda *_: 0.5)
    assert "With colour strength 1/4:" in to_markdown(result_of(grid, tmp_path))
