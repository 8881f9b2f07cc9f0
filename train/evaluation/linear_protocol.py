"""`evaluate.py linear`: a linear classifier of frozen representations by SGD, as SimCLR v1 evaluates.

The paper's recipe is in `linear_config`. Its learning rate was found for one network; here a grid of rates and weight
decays is trained at once, each setting twice: without the rows that are held out for validation, which choose the
setting by their central views, and on all rows. The second of the setting that is chosen is measured on the test set,
once, after its last epoch. Of a single setting, nothing is held out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from train.evaluation.linear_choice import Tried, choose, hold_out, measure_head, try_settings
from train.evaluation.linear_config import LinearConfig
from train.evaluation.linear_probe import BATCH_OF_BASE_LR, Head
from train.evaluation.linear_training import LinearTraining, TrainedHeads
from train.evaluation.results import Result

__all__ = ["LinearConfig", "run_linear"]


def run_linear(config: LinearConfig) -> Result:
    """Train all settings, choose one, measure it. All ranks must call; those of `streamed` share each batch.

    Returns:
        On rank 0; the others train and have no figures.

    Raises:
        ValueError: a file is missing or damaged, classes do not fit, a class has nothing to hold out, or a batch does
            not divide among the ranks.
        OSError: likewise.
        RunFailed: every setting has diverged.
    """
    training = LinearTraining(config)
    settings, held_out, heads = config.settings, None, config.settings
    if len(settings) > 1:
        held_out = hold_out(training.labels, config.val_fraction, config.seed)
        heads = [*(replace(head, skips_held_out=True) for head in settings), *settings]
    training.set_up()
    seeds = range(config.seed, config.seed + config.num_seeds)
    trained = [training.train(heads, seed, held_out) for seed in seeds]
    if training.ranks.rank != 0:
        return Result(protocol="linear", figures={})
    source = training.source
    validation = None
    if held_out is not None:
        validation = source.features("train").values[held_out], training.labels[held_out]
    tried = try_settings(settings, [one.heads for one in trained], validation, source.num_classes)
    best, on_all_rows = choose(tried), len(heads) - len(settings)
    test = source.features("test")
    figures = [
        measure_head(one.heads, on_all_rows + best, test.values, test.labels, test.num_classes, test.classes)
        for one in trained
    ]
    return Result(
        protocol="linear",
        figures={"all": figures},
        seeds={"all": list(seeds)},
        chosen=_words(settings[best], training.batch_size),
        chosen_by=_chosen_by(config, held_out),
        tried=[
            _words(one.head, training.batch_size) | _outcome(one, on_all_rows + i, trained)
            for i, one in enumerate(tried)
        ],
        details=_details(training, held_out),
        suffix=_suffix(config),
        leftovers=[one.unfinished.folder for one in trained],
    )


def _words(head: Head, batch_size: int) -> dict[str, float]:
    lr = head.base_lr * batch_size / BATCH_OF_BASE_LR
    return {"base_lr": head.base_lr, "lr": lr, "weight_decay": head.weight_decay}


def _outcome(tried: Tried, on_all_rows: int, trained: Sequence[TrainedHeads]) -> dict[str, float | bool | None]:
    loss = None if tried.diverged else statistics.fmean(one.losses[on_all_rows] for one in trained)
    return {"validation_top1": tried.validation_top1, "train_loss": loss, "diverged": tried.diverged}


def _chosen_by(config: LinearConfig, held_out: Tensor | None) -> str:
    if held_out is None:
        return "given in advance; trained on all training rows"
    top1 = f"mean top-1 of {config.num_seeds} seeds" if config.num_seeds > 1 else "top-1"
    return (
        f"{top1} after the last epoch on {int(held_out.sum())} of {len(held_out)} training rows, held out of the "
        "classifiers that were compared; the one measured has the same setting and learned from all training rows"
    )


def _details(training: LinearTraining, held_out: Tensor | None) -> dict[str, Any]:
    return {
        "measured": "after the last epoch",
        "global_batch_size": training.batch_size,
        "num_ranks": training.ranks.world_size,
        "num_train_samples": len(training.labels),
        "num_validation_samples": 0 if held_out is None else int(held_out.sum()),
        "refitted_on_all_rows": held_out is not None,
    }


def _suffix(config: LinearConfig) -> str:
    if config.features == "streamed":
        return ""
    return f"cached-augmented{config.augmented_epochs}" if config.augmented_epochs else "cached"
