"""Curves, clocks and colours of a report: what is drawn against what was written."""

import itertools
import math
import re

import numpy as np
import pytest

from tests.tools.reported import Page, make_run, metrics
from tools.report_chart import Chart, draw, line_style
from tools.report_clock import clock_of, unit_for
from tools.report_curves import metrics_of, throughput_curves, training_curves
from tools.report_numbers import duration, figure, tick_label, ticks
from tools.report_page import text
from tools.report_runs import read_run
from tools.report_series import reduced
from tools.report_settings import changed_options, command_again, environment
from tools.report_style import DARK, DASHES, LIGHT, NUM_COLORS
from tools.report_summary import status


def luminance(color):
    """Relative, as WCAG 2.2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_that_of_wcag_aa(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("paper", "soft"):
        for ink in ("ink", "muted", "link"):
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for mark in ("edge", *(f"s{i}" for i in range(NUM_COLORS))):
            assert contrast(theme[mark], theme[ground]) >= 3.0, (mark, ground)


def test_lines_differ_in_colour_and_dashes():
    styles = [line_style(i) for i in range(NUM_COLORS * len(DASHES))]
    assert len(set(styles)) == 32
    assert all(a.split()[1] != b.split()[1] for a, b in itertools.pairwise(styles))


def test_few_values_are_drawn_as_they_are():
    one = reduced("a", np.arange(5.0), np.array([3.0, 1.0, math.nan, 4.0, 1.5]))
    assert one.values_per_point == 1
    np.testing.assert_array_equal(one.mean, [3.0, 1.0, math.nan, 4.0, 1.5])
    assert (one.last, one.num_left_out) == (1.5, 1)


def test_many_values_become_means_with_their_range():
    values = np.arange(1000.0) % 10
    values[500], values[501] = 1e300, -1e300
    values[20:30] = math.inf
    one = reduced("a", np.arange(1000.0), values, most=100)
    assert (one.values_per_point, len(one.x), one.num_left_out) == (10, 100, 10)
    assert (one.x[0], one.mean[0], one.low[0], one.high[0]) == (4.5, 4.5, 0.0, 9.0)
    assert math.isnan(one.mean[2])
    assert (one.low[50], one.high[50]) == (-1e300, 1e300)
    assert one.last == 9.0


def test_a_line_is_broken_where_it_is_told():
    one = reduced("a", np.arange(4.0), np.ones(4), breaks=[2])
    np.testing.assert_array_equal(one.mean, [1, 1, math.nan, 1, 1])
    drawn = draw(Chart(key="a", title="a", x_name="step", series=[(0, one)]))
    (path,) = re.findall(r'class="run c0 d0"[^>]* d="([^"]*)"', drawn)
    assert path.count("M") == 2


def test_a_chart_in_numbers():
    """Field of 306 × 171 at (46, 8); the axis of values ends 5 % above the largest."""
    one = reduced("a & b", np.array([0.0, 10.0]), np.array([0.0, 2.0]))
    drawn = draw(Chart(key="a", title="loss", x_name="step", series=[(1, one)]))
    (path,) = re.findall(r'class="run c1 d1"[^>]* d="([^"]*)"', drawn)
    assert path == f"M46.0 179.0L352.0 {179 - 171 / 1.05:.1f}"
    page = Page(drawn)
    assert page.of("svg")[0]["aria-label"] == "loss by step: ends at 2"
    assert page.rows == [["step", "loss"], ["0", "0"], ["10", "2"]]
    assert "a & b: 2 at step 10" in page.said
    assert (
        draw(Chart(key="a", title="a", x_name="x", series=[(0, reduced("a", np.ones(1), np.full(1, math.nan)))])) == ""
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (4.59486, "4.595"),
        (1234567.0, "1,234,567"),
        (0.000012345, "1.234e−5"),
        (-0.5, "−0.5"),
        (math.nan, "not a number"),
        (-math.inf, "−infinite"),
        (1e300, "1e300"),
    ],
)
def test_figures(value, shown):
    assert figure(value) == shown


def test_durations():
    seconds = (0.04, 59.6, 61, 3599, 3 * 3600 + 29, 49 * 3600, math.nan)
    assert [duration(s) for s in seconds] == [
        "0.0 s",
        "60 s",
        "1 min 1 s",
        "1 h 0 min",
        "3 h 0 min",
        "2 d 1 h",
        "unknown",
    ]


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0, 1, ["0", "0.25", "0.50", "0.75", "1.00"]),
        (3.2, 6.4, ["4", "5", "6"]),
        (0, 40_000, ["0", "10 k", "20 k", "30 k", "40 k"]),
        (-2, 2, ["−2", "−1", "0", "1", "2"]),
        (0, 2e-7, ["0", "5e−08", "1e−07", "1.5e−07", "2e−07"]),
        (7, 7.0001, ["7.000000", "7.000025", "7.000050", "7.000075", "7.000100"]),
    ],
)
def test_ticks(low, high, shown):
    values = ticks(low, high)
    assert [tick_label(value, values[1] - values[0]) for value in values] == shown


def test_hostile_words():
    assert text("<b>\u202e\0'\"&") == "&lt;b&gt;\ufffd\ufffd&#x27;&quot;&amp;"


def test_pauses_and_resumes_by_the_clock(tmp_path):
    lines = metrics(10)  # a step in two seconds, from 1000 to 1020
    for line in lines[4:]:
        line["time"] += 60
    lines[8]["time"] -= 5  # a clock that was set back
    run_dir = make_run(tmp_path, lines=lines)
    (run_dir / "train.log").write_text(
        "2026 INFO train.loop: simclr on 2 ranks of 8 images\n"
        "2026 INFO train.loop: resuming from runs/a/checkpoints/step-000000004.safetensors: epoch 1, batch 1\n"
    )
    run = read_run(run_dir, "run")
    assert (run.world_size, run.resumed_steps, run.step) == (2, [4], 10)
    clock = clock_of(run)
    assert clock.is_wall
    assert (list(clock.pauses), list(clock.resumed)) == ([4], [4])
    assert clock.pause_seconds(4) == 60.0
    assert (clock.total, clock.total_trained) == (80.0, 20.0)
    np.testing.assert_array_equal(clock.seconds[6:9], [74, 76, 76])
    page = Page(throughput_curves([run], [clock]))
    assert ["run", "4", "8.0 s after the start", "1 min 0 s", "then resumed"] in page.rows
    assert len(page.of("rect")) == 2
    assert page.said.count("run resumed after step 4") == 2
    assert "s since the start" in page.text


def test_older_metrics_have_no_clock(tmp_path):
    lines = [{name: value for name, value in line.items() if name != "time"} for line in metrics(10)]
    run = read_run(make_run(tmp_path, lines=lines), "run")
    clock = clock_of(run)
    assert not clock.is_wall
    np.testing.assert_array_equal(clock.seconds, np.arange(2.0, 21.0, 2.0))
    assert "These metrics carry no time" in throughput_curves([run], [clock])
    assert unit_for([clock]) == ("s", 1.0)


def test_metrics_of_every_kind_of_run(tmp_path):
    ours = read_run(make_run(tmp_path, "a", lines=metrics(2, accuracy=0.5, zeta=1.0)), "a")
    theirs = read_run(make_run(tmp_path, "b", lines=metrics(2, probe_accuracy=0.5, epoch=0.0)), "b")
    assert metrics_of([ours, theirs]) == ["loss", "probe_accuracy", "accuracy", "zeta"]
    page = Page(training_curves([ours, theirs]))
    assert ["step", "a", "b"] in page.rows
    assert "a ends at 4.307; b ends at 4.307" in page.text


def test_a_hundred_thousand_lines_are_a_small_drawing(tmp_path):
    lines = [f'{{"step": {i}, "loss": {i % 7}, "images_per_sec": 8.0}}\n' for i in range(1, 100_001)]
    drawn = training_curves([read_run(make_run(tmp_path, lines=lines), "run")])
    assert len(drawn) < 40_000
    assert "Means of 417 lines, and their range." in drawn


@pytest.mark.parametrize(
    ("step", "position", "loader", "shown"),
    [
        (12, {"epoch_ended": True}, {"epoch": 2, "next_batch": 4}, ("finished", "all 12 steps")),
        (
            8,
            {"epoch_ended": True},
            {"epoch": 1, "next_batch": 4},
            ("interrupted", "at step 8 of 12; it resumes from step 8"),
        ),
        (6, {}, {"epoch": 1, "next_batch": 2}, ("interrupted", "at step 6 of 12; it resumes from step 6")),
        (3, {}, {"epoch": 0, "next_batch": 3}, ("interrupted", "at step 3; it resumes from step 3")),
        (0, {}, {}, ("no step finished", "no line of metrics, and no checkpoint")),
    ],
)
def test_how_far_a_run_came(tmp_path, step, position, loader, shown):
    """Three epochs; how many steps each has is worked out from the checkpoint."""
    run = read_run(make_run(tmp_path, step=step, position=position, loader=loader), "run")
    assert status(run) == shown


def test_a_run_that_goes_on(tmp_path):
    from train.run_lock import locked_run_dir

    run_dir = make_run(tmp_path, lines=metrics(2))
    with locked_run_dir(run_dir):
        assert status(read_run(run_dir, "run"))[0] == "still running"
    assert status(read_run(run_dir, "run")) == ("interrupted", "at step 2; it has no checkpoint")


def test_options_and_the_environment(tmp_path):
    run_dir = make_run(tmp_path, "run", "--model.temperature=0.25", step=2)
    (run_dir / "starts.jsonl").write_text('{"host": "a<b", "world_size": 4, "commit": "c0ffee", "step": 0}\n')
    run = read_run(run_dir, "run")
    changed = {name: (value, default) for name, value, default in changed_options(run.config)}
    assert changed["model.temperature"] == (0.25, 0.1)
    assert changed["data.path"] == ("no.beton", "–")
    assert "optim.momentum" not in changed
    rows = Page(environment(run)).rows
    assert ["machine", "a<b"] in rows
    assert ["commit of Twinview", "c0ffee"] in rows
    assert ["torch", "2.15.0"] in rows
    assert command_again(run).startswith("deepspeed --num_gpus 4 train/pretrain.py --config=")
