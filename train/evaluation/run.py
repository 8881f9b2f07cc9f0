"""One evaluation from start to end: checkpoint → representations → accuracy by number of labels → JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from pipelines.beton import open_beton
from pipelines.manifest import load_manifest
from train.checkpoint import load_checkpoint
from train.config import config_from_dict
from train.evaluation.features import Features, Representation, build_encoder, represent
from train.evaluation.few_shot import Accuracies, Protocol, few_shot_accuracy
from train.initial_encoder import Weights, Which, find_checkpoint, results_dir
from train.runtime import choose_device, cores_per_rank, keep_freed_memory, read_ranks


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated, on which data, with how many labels."""

    checkpoint: str
    """A checkpoint of a run or of `tools.import_checkpoint`, or a run directory, in which `which` chooses."""
    train_data: str
    """The `.beton` whose labels are used."""
    test_data: str
    """The `.beton` that accuracy is measured on."""
    which: Which = "latest"
    """Of a run directory: the latest checkpoint, or the best by `train.keep_best` (by the loss, where that is none)."""
    weights: Weights = "live"
    """Of the checkpoint: those of the last step, or their moving average (`train.ema_decay`)."""
    representation: Representation = "learned"
    """`learned`; `random`: the network that the run started from; `pixels`: none at all."""
    labels_per_class: tuple[int, ...] = ()
    """Labels of each class that are used, beside all of them: for instance [1, 5, 20]."""
    num_seeds: int = 5
    """Random subsets of each such size; means and standard deviations are over them."""
    k: int = 20
    """Neighbours that vote (`knn` alone)."""
    batch_size: int = 256
    """Images that go through the encoder at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    output_dir: str | None = None
    """Where `PROTOCOL-REPRESENTATION.json` is written; by default `evaluation/` in the run directory, or in a folder
    named as a checkpoint that is in none."""

    def __post_init__(self) -> None:
        for name in ("num_seeds", "k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if any(count < 1 for count in self.labels_per_class):
            raise ValueError(f"`labels_per_class` must be at least 1 each, got {list(self.labels_per_class)}")
        if self.weights == "average" and self.representation != "learned":
            raise ValueError(f"`weights` average needs `representation` learned, got {self.representation}")


def evaluate(protocols: Sequence[Protocol], config: EvaluateConfig) -> dict[Protocol, Accuracies]:
    """Represent both sets once, apply each protocol, and write a JSON file for each.

    Returns:
        Accuracy by number of labels, for each protocol.

    Raises:
        ValueError: a file is missing, damaged or unlabelled, or a class has too few samples.
    """
    path = find_checkpoint(Path(config.checkpoint), config.which)
    check_same_classes(config.train_data, config.test_data)
    train, test = _represent_both(path, config)
    results: dict[Protocol, Accuracies] = {}
    for protocol in protocols:
        results[protocol] = few_shot_accuracy(
            protocol,
            train.values,
            train.labels,
            test.values,
            test.labels,
            label_counts=(*config.labels_per_class, "all"),
            num_seeds=config.num_seeds,
            k=config.k,
        )
        output = output_path(protocol, config)
        output.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "protocol": protocol,
            **asdict(config),
            "checkpoint": str(path),
            "accuracy": results[protocol],
        }
        output.write_text(json.dumps(record, indent=2) + "\n")
    return results


def output_path(protocol: Protocol, config: EvaluateConfig) -> Path:
    """Where the result of a protocol is written."""
    folder = results_dir(find_checkpoint(Path(config.checkpoint), config.which)) / "evaluation"
    name = "-".join([protocol, config.representation, *(["average"] if config.weights == "average" else [])])
    return Path(config.output_dir or folder) / f"{name}.json"


def _represent_both(path: Path, config: EvaluateConfig) -> tuple[Features, Features]:
    ranks = read_ranks()
    device, num_cores = choose_device(config.device, ranks), cores_per_rank(ranks)
    if device.type == "cpu":
        keep_freed_memory()
    checkpoint = load_checkpoint(path)
    encoder = build_encoder(config.representation, checkpoint, weights=config.weights, source=path)
    trained = config_from_dict(checkpoint.config)
    train, test = (
        represent(encoder, data, trained, batch_size=config.batch_size, device=device, num_cores=num_cores)
        for data in (config.train_data, config.test_data)
    )
    return train, test


def check_same_classes(train_data: str, test_data: str) -> None:
    """Refuse two files whose labels mean different classes, as far as their manifests tell.

    Raises:
        ValueError: the first class that differs; or a file is missing or damaged.
    """
    manifests = []
    for path in (train_data, test_data):
        open_beton(path)
        manifests.append(load_manifest(path))
    train, test = manifests
    if train is None or test is None or train.classes == test.classes:
        return
    ours, theirs = train.classes or [], test.classes or []
    pairs = enumerate(zip_longest(ours, theirs))
    label, (expected, found) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    raise ValueError(
        f"`test_data` must have the classes of `train_data`, but label {label} is {found} in {test_data} and "
        f"{expected} in {train_data}; convert both from folders with the same class names"
    )
