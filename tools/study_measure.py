"""Measurements of a study that are no protocol of `train/evaluate.py`; each is a process of its own.

    python -m tools.study_measure network --run RUN --test_data B --output FILE
    python -m tools.study_measure transformation --task rotation --run RUN --train_data A --test_data B --output FILE

`network` is the accuracy of a classifier that was trained with labels; `transformation` asks h and z which
transformation was applied. FILE is JSON: `{"figures": {name: share}}`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tools.study_grid import ACCURACY
from tools.study_records import write_json
from train.cli import run


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="study_measure", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["network", "transformation"])
    parser.add_argument("--run", required=True, help="a run directory")
    parser.add_argument("--task", help="of `transformation`: which")
    parser.add_argument("--train_data", help="of `transformation`: images that it learns from")
    parser.add_argument("--test_data", required=True, help="what is measured on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", required=True, help="the file that is written")
    options = parser.parse_args()
    measure = network if options.what == "network" else transformation
    write_json(Path(options.output), measure(options))


def network(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the last checkpoint of a run with the method `supervised`."""
    from train.evaluation.labelled_data import open_labelled
    from train.evaluation.network_accuracy import load_network, network_accuracy

    run_dir = Path(options.run)
    _, config = load_network(run_dir)
    data = open_labelled(options.test_data, "test")
    num_classes = config.model.classifier.num_classes
    metrics = network_accuracy(run_dir, data, num_classes=num_classes, batch_size=256)
    return {"figures": {ACCURACY: metrics.top1}}


def transformation(options: argparse.Namespace) -> dict[str, Any]:
    """What h and z tell of a transformation; all of what was measured stands under `details`."""
    from train.evaluation.transform_prediction import TransformPredictionConfig, predict_transformations

    config = TransformPredictionConfig(
        checkpoint=options.run,
        train_data=options.train_data,
        test_data=options.test_data,
        tasks=(options.task,),
        device=options.device,
    )
    details = predict_transformations(config)
    measured = details["tasks"][options.task]["measured"]
    return {"figures": {name: measured[name]["mean"] for name in ("h", "z")}, "details": details}


if __name__ == "__main__":
    run(main)
