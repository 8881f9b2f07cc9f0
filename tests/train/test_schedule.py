"""The learning rate against worked numbers, google's formula and torch's schedulers; the side of the views by epoch."""

import math
import re

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from train.config import parse_pretrain_config
from train.schedule import ScheduleConfig, check_sizes, learning_rate, num_warmup_steps, size_of_epoch


def rates(total_steps, steps_per_epoch=10, *, peak_lr=1.0, **options):
    config = ScheduleConfig(**options)
    return [
        learning_rate(step, config=config, peak_lr=peak_lr, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        for step in range(total_steps + 1)
    ]


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
def test_worked_values_of_the_cosine(step, expected):
    assert rates(10, peak_lr=4.8, warmup_steps=2)[step] == pytest.approx(expected, abs=1e-15)


def test_worked_values_of_the_other_decays():
    assert rates(10, peak_lr=8.0, warmup_steps=2, decay="linear") == [0, 4, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert rates(6, peak_lr=8.0, warmup_steps=2, decay="constant") == [0, 4, 8, 8, 8, 8, 8]


def google_rate(step, peak_lr, total_steps, warmup_steps):
    """google-research/simclr, tf2/model.py: WarmUpAndCosineDecay, with tf.keras' CosineDecay written out."""
    scaled_lr = peak_lr
    warmup_rate = step / float(warmup_steps) * scaled_lr if warmup_steps else scaled_lr
    completed = min(step - warmup_steps, total_steps - warmup_steps) / (total_steps - warmup_steps)
    cosine_rate = scaled_lr * 0.5 * (1.0 + math.cos(math.pi * completed))
    return warmup_rate if step < warmup_steps else cosine_rate


@pytest.mark.parametrize("warmup_epochs", [0.0, 10.0, 12.5])
def test_the_default_is_googles_formula(warmup_epochs):
    ours = rates(3900, 39, peak_lr=4.8, warmup_epochs=warmup_epochs)
    theirs = [google_rate(step, 4.8, 3900, round(warmup_epochs * 39)) for step in range(3901)]
    assert ours == pytest.approx(theirs, rel=1e-14)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_torchs_schedulers_give_the_same_rates(decay):
    warmup, total, peak = 7, 40, 4.8
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    after = {
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=total - warmup),
        "linear": lambda: LinearLR(optimizer, 1.0, end_factor=0.0, total_iters=total - warmup),
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
    }[decay]()
    rising = LinearLR(optimizer, start_factor=1e-12, end_factor=1.0, total_iters=warmup)  # torch refuses 0
    schedule = SequentialLR(optimizer, [rising, after], milestones=[warmup])
    theirs = []
    for _ in range(total):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(total, warmup_steps=warmup, peak_lr=peak, decay=decay)[:total] == pytest.approx(theirs, abs=1e-10)


def test_it_rises_to_the_peak_and_falls_from_it():
    ours = rates(1000, warmup_steps=100)
    assert ours == sorted(ours[:101]) + sorted(ours[101:], reverse=True)
    assert ours.index(max(ours)) == 100


def test_without_warmup_the_first_update_has_the_peak_rate():
    assert rates(7, peak_lr=0.3, warmup_epochs=0)[0] == 0.3


def test_by_the_epoch_the_rate_of_the_first_step_holds():
    # Epochs of 3 steps; the warm-up moves with each of its 3, then epochs begin at 3, 6 and 9 of 12.
    ours = rates(12, 3, peak_lr=9.0, warmup_epochs=1, decay="linear", every="epoch")
    assert ours == pytest.approx([0, 3, 6, 9, 9, 9, 6, 6, 6, 3, 3, 3, 0])
    # A warm-up of 4 steps ends within the second epoch, whose other steps keep the peak.
    ours = rates(12, 3, peak_lr=8.0, warmup_steps=4, decay="linear", every="epoch")
    assert ours == pytest.approx([0, 2, 4, 6, 8, 8, 6, 6, 6, 3, 3, 3, 0])
    by_step = rates(400, 40, warmup_epochs=2)
    assert rates(400, 40, warmup_epochs=2, every="epoch")[80:400] == [by_step[t // 40 * 40] for t in range(80, 400)]


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "expected"),
    [(10.0, 312, 3120), (0.0, 312, 0), (0.5, 5, 2), (2.5, 3, 8), (1 / 3, 3, 1)],
)
def test_warmup_epochs_become_whole_steps(epochs, steps_per_epoch, expected):
    config = ScheduleConfig(warmup_epochs=epochs)
    assert num_warmup_steps(config, steps_per_epoch=steps_per_epoch, total_steps=10_000) == expected


def test_warmup_steps_count_where_they_are_given():
    assert num_warmup_steps(ScheduleConfig(warmup_steps=17), steps_per_epoch=312, total_steps=10_000) == 17
    assert num_warmup_steps(ScheduleConfig(warmup_steps=0), steps_per_epoch=312, total_steps=10_000) == 0


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "`schedule.warmup_epochs` must be shorter than the run of 50 steps (10 epochs), got 10 (50 steps)"),
        ({"warmup_steps": 50}, "`schedule.warmup_steps` must be shorter than the run of 50 steps (10 epochs), got 50"),
    ],
)
def test_a_warmup_as_long_as_the_run_is_refused(options, found):
    with pytest.raises(ValueError) as caught:
        num_warmup_steps(ScheduleConfig(**options), steps_per_epoch=5, total_steps=50)
    assert str(caught.value) == found + "; warm up for a tenth of the run, or train longer"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_epochs": -1.0}, "`schedule.warmup_epochs` must be finite and not negative, got -1.0; use 0 for none"),
        ({"warmup_epochs": math.nan}, "`schedule.warmup_epochs` must be finite and not negative, got nan"),
        ({"warmup_epochs": math.inf}, "`schedule.warmup_epochs` must be finite and not negative, got inf"),
        ({"warmup_steps": -1}, "`schedule.warmup_steps` must be null or not negative, got -1; use 0 for none"),
        (
            {"warmup_epochs": 5.0, "warmup_steps": 100},
            "`schedule.warmup_epochs` and `schedule.warmup_steps` must not both be given, got 5 and 100; set one",
        ),
        ({"warmup_epochs": None}, "`schedule.warmup_epochs` and `schedule.warmup_steps` must not both be null"),
        ({"decay": "step"}, "`schedule.decay` must be one of cosine, linear, constant, got step"),
        ({"every": "batch"}, "`schedule.every` must be one of step, epoch, got batch"),
        ({"sizes": ()}, "`schedule.sizes` must begin with the side of epoch 0, got []; such as [[0, 160], [60, 224]]"),
        ({"sizes": ((1, 160),)}, "`schedule.sizes` must begin with the side of epoch 0, got [[1, 160]]"),
        ({"sizes": ((0, 160), (9, 192), (9, 224))}, "`schedule.sizes` must have rising first epochs, got [[0, 160], "),
        ({"sizes": ((0, 0), (5, 24))}, "`schedule.sizes` must have sides of at least 1 pixel, got [[0, 0], [5, 24]]"),
    ],
)
def test_what_cannot_be_is_named(options, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        ScheduleConfig(**options)


def test_the_side_of_each_epoch():
    config = ScheduleConfig(sizes=((0, 160), (3, 192), (5, 224)))
    assert [size_of_epoch(config, epoch, 224) for epoch in range(8)] == [160, 160, 160, 192, 192, 224, 224, 224]
    assert size_of_epoch(ScheduleConfig(), 7, 96) == 96


def test_sides_that_the_run_does_not_go_through_are_refused():
    config = ScheduleConfig(sizes=((0, 160), (30, 224)))
    check_sizes(config, num_epochs=31, size=224)
    check_sizes(ScheduleConfig(), num_epochs=1, size=32)
    with pytest.raises(ValueError) as caught:
        check_sizes(config, num_epochs=30, size=224)
    assert str(caught.value) == (
        "`schedule.sizes` must begin within the 30 epochs of the run, got epoch 30 for side 224; the last epoch is 29"
    )
    with pytest.raises(ValueError) as caught:
        check_sizes(config, num_epochs=100, size=192)
    assert str(caught.value) == (
        "the last side of `schedule.sizes` must be `augment.size`, 192, got 224; "
        "end with [30, 192], or set `augment.size` to 224"
    )


def test_the_command_line_takes_sides_and_steps():
    config = parse_pretrain_config(
        [
            "--name=a",
            "--data.path=b",
            "--train.epochs=100",
            "--schedule.warmup_steps=300",
            "--schedule.decay=linear",
            "--schedule.every=epoch",
            "--schedule.sizes=[[0,160],[60,192],[80,224]]",
        ]
    )
    assert config.schedule == ScheduleConfig(
        warmup_steps=300, decay="linear", every="epoch", sizes=((0, 160), (60, 192), (80, 224))
    )


def test_warmup_steps_can_take_the_place_of_a_files_epochs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schedule:\n  warmup_epochs: 5\n")
    words = [f"--config={recipe}", "--name=a", "--data.path=b", "--schedule.warmup_steps=300"]
    with pytest.raises(ValueError, match=r"got 5 and 300; set one of them to null$"):
        parse_pretrain_config(words)
    schedule = parse_pretrain_config([*words, "--schedule.warmup_epochs=null"]).schedule
    assert num_warmup_steps(schedule, steps_per_epoch=100, total_steps=10_000) == 300
