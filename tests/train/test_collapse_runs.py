"""Runs that learn and runs that are made to collapse: the figures that the thresholds of the warning stand between.

    python -m pytest -m slow -p no:xdist -s tests/train/test_collapse_runs.py

prints the table of docs/guides/online_evaluation.md.
"""

import logging
import math
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F

from model.build import build_method
from pipelines.augment import build_recipe
from pipelines.build import build_loader, open_data
from tests.train.runs import ROOT
from tools.convert import convert
from tools.digits import write_digits
from tools.image_encoding import EncodeOptions
from train.config import parse_pretrain_config
from train.online.collapse import CollapseWatch
from train.online.representation_tap import RepresentationTap
from train.optim.lars import LARS, peak_lr
from train.optim.param_groups import param_groups

WARMUP_STEPS, EVERY = 20, 5
CPU = torch.device("cpu")


def of_positives_alone(method, projections):
    """What the loss would be without its negatives."""
    return -(F.normalize(projections[0]) * F.normalize(projections[1])).sum(1).mean()


def of_the_method(method, projections):
    return method.loss(projections)[0]


def close_the_head(method):
    """The scale of its last batch norm is 0, and so is every gradient."""
    torch.nn.init.zeros_(method.projection_head.layers[-1][1].weight)


def every_image_alike(views):
    return [view[:1].expand_as(view).contiguous() for view in views]


def black(views):
    return [torch.zeros_like(view) for view in views]


def nothing(what):
    return what


# (name, steps, does it collapse, learning rate times, loss, change of the method, change of the views)
RUNS = [
    ("the demo's recipe", 150, False, 1, of_the_method, nothing, nothing),
    ("100 times its learning rate", 100, False, 100, of_the_method, nothing, nothing),
    ("a loss without negatives", 150, True, 1, of_positives_alone, nothing, nothing),
    ("one image in every place", 60, True, 1, of_the_method, nothing, every_image_alike),
    ("black images", 40, True, 1, of_the_method, nothing, black),
    ("a projection head of zeros", 40, True, 1, of_the_method, close_the_head, nothing),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    convert(folder / "train", folder / "train.beton", EncodeOptions(encode="raw"), workers=1)
    options = ["--model.encoder.width=0.125", "--data.global_batch_size=128"]  # an eighth of the work
    return parse_pretrain_config(
        [f"--config={ROOT}/configs/digits_demo.yaml", f"--data.path={folder}/train.beton", *options]
    )


def learning_rate(peak, step, steps):
    """Warm-up and cosine decay."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))) / 2


def trained(config, steps, times, loss_of, change_method, change_views):
    """The measurements of a run of one process, as `CollapseWatch` gives them, after the warm-up."""
    method = build_method(config.model, seed=0).to(memory_format=torch.channels_last)
    change_method(method)
    optimizer = LARS(param_groups(method, config.optim.weight_decay), lr=0.0, momentum=0.9, trust_coefficient=1e-3)
    taps = RepresentationTap(method.encoder), RepresentationTap(method.projection_head)
    watch, found, step = CollapseWatch(warmup_steps=WARMUP_STEPS), [], 0
    peak = peak_lr(config.optim, config.data.global_batch_size) * times
    recipe, data = build_recipe(config.augment), open_data(config.data)
    options = {"seed": 0, "rank": 0, "world_size": 1, "device": CPU, "dtype": torch.float32, "num_cores": 1}
    with closing(build_loader(config.data, data, recipe, **options)) as loader:
        while step < steps:
            for batch in loader.epoch(step // len(loader)):
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(peak, step, steps)
                loss = loss_of(method, method.project(change_views(batch.views)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                kept = [tap.take() for tap in taps]
                if step % EVERY == 0:
                    figures = watch.measure(*kept, step=step)
                    found += [figures] if step > WARMUP_STEPS else []
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "steps", "collapses", "times", "loss_of", "method", "views"), RUNS)
def test_collapse_is_told_from_learning(config, caplog, name, steps, collapses, times, loss_of, method, views):
    with caplog.at_level(logging.WARNING, "train.online.collapse"):
        found = trained(config, steps, times, loss_of, method, views)
    cells = [name]
    for figure in ("representation_std", "projection_rank"):
        values = sorted(line[figure] for line in found)
        cells.append(f"{values[0]:.2f} to {values[-1]:.2f} (median {values[len(values) // 2]:.2f})")
    warnings = [record.getMessage().split(":")[0] for record in caplog.records if "collapses" in record.getMessage()]
    print(f"\n| {' | '.join(cells)} | {warnings[0] if warnings else 'none'} |")
    assert bool(warnings) == collapses
