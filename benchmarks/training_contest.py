"""The training contest with what was learned: `python -m benchmarks.training_contest --seeds 2 --json FILE`.

Ours and lightly's script train the same network from the same weights for the same epochs, an epoch each in turns, and
scikit-learn judges both encoders, and the one that they start from. Without `--data` on the demo's digits; with it on
the raw `train.beton` and `test.beton` of a folder:

    python -m benchmarks.training_contest --config configs/study_cifar10.yaml --data data/cifar10 --epochs 5 --seeds 2

Other options are the configuration's: `--train.precision fp32`, `--data.subset.per_class 2500`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.contestant import Contestant, ContestantProcess, Turn
from benchmarks.environment import environment
from benchmarks.training_accuracy import (
    Accuracy,
    LabelledImages,
    accuracy_of,
    encoder_of,
    encoder_of_run,
    read_labelled,
)
from benchmarks.training_figure import draw_contest, table
from benchmarks.training_twinview import images_of_epoch
from benchmarks.training_work import (
    ROOT,
    Script,
    lightly_contestant,
    make_digits,
    read_config,
    settings_of,
    twinview_contestant,
)
from pipelines.build import Subset, open_data
from train.cli import run
from train.config import PretrainConfig

EPOCH_PATIENCE_S = 3600.0
NAMES = ("twinview", "lightly")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One contestant's training from one seed; an item is a source image."""

    contestant: str
    seed: int
    images_per_sec: float
    """Median over the epochs after the first one."""
    cpu_ms_per_image: float
    """Of all threads and processes, likewise."""
    seconds: float
    """Of all epochs."""
    accuracy: Accuracy


@dataclass(frozen=True, kw_only=True)
class Contest:
    """All of it."""

    command: str
    num_images: int
    num_test: int
    epochs: int
    batch_size: int
    cores: int
    workers: int
    start: dict[int, Accuracy]
    """By seed, of the weights that both start with."""
    outcomes: list[Outcome]
    speed_ratio: float
    """Median over all epochs but the first of each seed: ours against lightly's in the same round."""
    config: str
    environment: dict[str, str | int | float]


def main() -> None:
    """Parse, train, judge, write."""
    parser = argparse.ArgumentParser(prog="training_contest", description="Training against lightly's script.")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/digits_demo.yaml", help="of the runs")
    parser.add_argument("--data", type=Path, metavar="DIR", help="raw train.beton and test.beton (default: digits)")
    parser.add_argument("--epochs", type=int, help="default: as the configuration says")
    parser.add_argument("--seeds", type=int, default=2, help="how many, from 0 (default: 2)")
    parser.add_argument("--cores", type=int, default=2, help="of everyone, for all that it does (default: 2)")
    parser.add_argument("--workers", type=int, default=2, help="processes of lightly's DataLoader (default: 2)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--figure", type=Path, help="where the picture goes, a PNG")
    options, overrides = parser.parse_known_args()
    if options.seeds < 1:
        raise ValueError(f"`--seeds` must be at least 1, got {options.seeds}")
    if options.epochs is not None:
        overrides.append(f"--train.epochs={options.epochs}")
    with tempfile.TemporaryDirectory() as folder:
        data = options.data
        if data is None:
            data = Path(folder, "digits")
            make_digits(data)
        config = read_config(options.config, data / "train.beton", Path(folder, "runs"), *overrides)
        if config.train.epochs < 2:
            raise ValueError("`--epochs` must be at least 2, got 1; the first one is not timed")
        contest = hold(config, data / "test.beton", range(options.seeds), options.cores, options.workers)
    print(table(contest))
    if options.json:
        options.json.write_text(json.dumps(asdict(contest), indent=2) + "\n")
    if options.figure:
        draw_contest(contest, options.figure)


def hold(config: PretrainConfig, test_beton: Path, seeds: Sequence[int], cores: int, workers: int) -> Contest:
    """Train from every seed, and judge.

    Raises:
        ValueError: lightly's script cannot train what `config` says, or the images have no labels.
    """
    data = open_data(config.data)
    rows = data.rows if isinstance(data, Subset) else None
    train, test = read_labelled(Path(config.data.path), rows), read_labelled(test_beton)
    turns: dict[tuple[str, int], list[Turn]] = {}
    outcomes: list[Outcome] = []
    start: dict[int, Accuracy] = {}
    for seed in seeds:
        seeded = replace(config, seed=seed, runs_dir=str(Path(config.runs_dir, f"seed{seed}")))
        settings = settings_of(seeded)
        of_seed = train_in_turns(seeded, data.num_samples, cores, workers)
        start[seed] = accuracy_of(encoder_of(settings.weights), settings, train, test)
        for name in NAMES:
            turns[name, seed] = of_seed[name]
            accuracy = _judge(name, seeded, train, test)
            outcomes.append(_outcome(name, seed, of_seed[name], accuracy))
            print(outcomes[-1], file=sys.stderr)
    ratios = [
        theirs.seconds / ours.seconds
        for seed in seeds
        for ours, theirs in zip(turns["twinview", seed][1:], turns["lightly", seed][1:], strict=True)
    ]
    return Contest(
        command=" ".join(["python -m benchmarks.training_contest", *sys.argv[1:]]),
        num_images=data.num_samples,
        num_test=len(test.images),
        epochs=config.train.epochs,
        batch_size=config.data.global_batch_size,
        cores=cores,
        workers=workers,
        start=start,
        outcomes=outcomes,
        speed_ratio=statistics.median(ratios),
        config=config.name,
        environment=environment(),
    )


def train_in_turns(config: PretrainConfig, num_images: int, cores: int, workers: int) -> dict[str, list[Turn]]:
    """All epochs of both, one each in turns, in rotating order."""
    script = Script(threads=cores, workers=workers, weights=_weights(config))
    contestants: list[Contestant] = [
        twinview_contestant("twinview", config, num_images, cores),
        lightly_contestant("lightly", config, num_images, cores, script),
    ]
    items = images_of_epoch(num_images, config.data.global_batch_size)
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in contestants}
    with ExitStack() as stack:
        processes = []
        for contestant in contestants:
            processes.append(ContestantProcess(contestant))
            stack.callback(processes[-1].close)
        for process in processes:
            process.wait_for_setup()
        for epoch in range(config.train.epochs):
            for process in processes if epoch % 2 == 0 else reversed(processes):
                turns[process.name].append(process.turn(items, EPOCH_PATIENCE_S))
    return turns


def _judge(name: str, config: PretrainConfig, train: LabelledImages, test: LabelledImages) -> Accuracy:
    if name == "twinview":
        encoder = encoder_of_run(Path(config.runs_dir, name))
    else:
        encoder = torch.load(_weights(config), weights_only=True)
    return accuracy_of(encoder, settings_of(config), train, test)


def _weights(config: PretrainConfig) -> Path:
    return Path(config.runs_dir, "lightly.pt")


def _outcome(name: str, seed: int, turns: list[Turn], accuracy: Accuracy) -> Outcome:
    timed = turns[1:]
    return Outcome(
        contestant=name,
        seed=seed,
        images_per_sec=statistics.median(turn.items / turn.seconds for turn in timed),
        cpu_ms_per_image=1e3 * statistics.median(turn.cpu_seconds / turn.items for turn in timed),
        seconds=sum(turn.seconds for turn in turns),
        accuracy=accuracy,
    )


if __name__ == "__main__":
    run(main)
