"""The learning rate at steps whose values are worked out from the formula."""

import math

import pytest

from train.schedule import ScheduleConfig, learning_rate, num_warmup_steps


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),  # google's code: the first update moves nothing
        (1, 2.4),  # half of the warm-up
        (2, 4.8),  # the peak
        (4, 4.8 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (6, 2.4),
        (8, 4.8 * (1 - math.sqrt(0.5)) / 2),
        (9, 4.8 * (1 - math.cos(math.pi / 8)) / 2),  # the last update, still above 0
        (10, 0.0),
    ],
)
def test_worked_values(step, expected):
    assert learning_rate(step, peak_lr=4.8, total_steps=10, warmup_steps=2) == pytest.approx(expected, abs=1e-15)


def test_without_warmup_the_first_update_has_the_peak_rate():
    assert learning_rate(0, peak_lr=0.3, total_steps=7, warmup_steps=0) == 0.3


def test_it_rises_to_the_peak_and_falls_from_it():
    rates = [learning_rate(t, peak_lr=1.0, total_steps=1000, warmup_steps=100) for t in range(1001)]
    assert rates == sorted(rates[:101]) + sorted(rates[101:], reverse=True)
    assert rates.index(max(rates)) == 100


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "expected"),
    [(10.0, 312, 3120), (0.0, 312, 0), (0.5, 5, 2), (2.5, 3, 8), (1 / 3, 3, 1)],
)
def test_warmup_epochs_become_whole_steps(epochs, steps_per_epoch, expected):
    config = ScheduleConfig(warmup_epochs=epochs)
    assert num_warmup_steps(config, steps_per_epoch=steps_per_epoch, total_steps=10_000) == expected


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError) as caught:
        num_warmup_steps(ScheduleConfig(), steps_per_epoch=5, total_steps=50)
    assert str(caught.value) == (
        "`schedule.warmup_epochs` must be shorter than the run of 50 steps (10 epochs), got 10 (50 steps); "
        "warm up for a tenth of the run, or train longer"
    )


@pytest.mark.parametrize("epochs", [-1.0, math.nan, math.inf])
def test_an_impossible_warmup_is_named(epochs):
    with pytest.raises(ValueError, match=r"^`schedule\.warmup_epochs` must be finite and not negative, got"):
        ScheduleConfig(warmup_epochs=epochs)
