"""The whole way on one machine, in minutes: images → `.beton` → pretraining → accuracy → report.

`python -m tools.demo` (or `make demo`) runs the commands that a user would, on scikit-learn's handwritten digits, with
two CPU ranks or the GPUs that there are. Labels are used in the evaluation alone, which is on digits that pretraining
never saw. It ends with a table, `runs/demo/summary.json` and `runs/demo/report.html`. Arguments are passed on to
`train/pretrain.py`, as in `python -m tools.demo --train.epochs 10`.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch

from tools.digits import write_digits
from tools.report import write_report
from train.cli import RunFailed, run
from train.config import parse_pretrain_config
from train.evaluation.knn_protocol import KNNConfig
from train.evaluation.logistic_protocol import LogisticConfig
from train.evaluation.protocol import PROTOCOLS, EvaluationConfig, Representation, evaluate
from train.evaluation.results import record_of_figures
from train.metrics import read_metrics
from train.runtime import free_port

CONFIG = Path("configs/digits_demo.yaml")
NAME = "demo"  # as in that file
KINDS: tuple[Representation, ...] = get_args(Representation)
CLASSIFIERS = ("knn", "linear")  # nearest neighbours, and logistic regression with one penalty for all
LABELS_PER_CLASS = (1, 5, 20)
NUM_CPU_RANKS = 2

Accuracies = dict[str, dict[str, float]]
"""By the number of labels a class, or "all": `mean` and `std`, in [0, 1]."""


def main() -> None:
    """Run all steps."""
    arguments = ["--config", str(CONFIG), *sys.argv[1:]]
    config = parse_pretrain_config(arguments)
    if config.name != NAME:
        raise ValueError(f"`name` must stay {NAME!r}, the run that a demo starts by removing, got {config.name!r}")
    data = Path(config.data.path).parent
    print("1/4  scikit-learn's handwritten digits → folders of PNGs → .beton")
    write_digits(data)
    for split in ("train", "test"):
        beton = data / f"{split}.beton"
        call([sys.executable, "-m", "tools.convert", data / split, beton, "--encode", "raw", "--force"])

    print("\n2/4  pretraining without labels")
    shutil.rmtree(config.run_dir, ignore_errors=True)  # a demo starts anew; any other run would be resumed
    started = time.perf_counter()
    call([*launcher(), "train/pretrain.py", *arguments])
    train_seconds = time.perf_counter() - started

    print("\n3/4  evaluating on held-out digits")
    accuracy = {kind: evaluated(config.run_dir, data, kind) for kind in KINDS}
    summary = {
        "images_per_sec": images_per_sec(config.run_dir, config.data.global_batch_size),
        "train_seconds": train_seconds,
        "accuracy": {kind: summarize(figures) for kind, figures in accuracy.items()},
    }
    (config.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    print("\n4/4  results\n")
    print(table(accuracy))
    print(f"\npretraining: {train_seconds:.0f} s, {summary['images_per_sec']:.0f} images/s")
    print(f"summary:     {config.run_dir / 'summary.json'}")
    print(f"report:      {write_report(config.run_dir)}")


def launcher() -> list[str | Path]:
    """The `deepspeed` command: on all GPUs, or with two ranks on the CPU."""
    num_ranks = NUM_CPU_RANKS
    if torch.cuda.is_available():
        # A batch of 256 divides among so many of the GPUs that there are.
        num_ranks = 2 ** int(math.log2(torch.cuda.device_count()))
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [deepspeed, "--num_gpus", str(num_ranks), "--master_port", str(free_port())]


def evaluated(run_dir: Path, data: Path, kind: Representation) -> dict[str, Accuracies]:
    """One representation by both classifiers."""
    common: dict[str, Any] = {
        "checkpoint": str(run_dir),
        "train_data": str(data / "train.beton"),
        "test_data": str(data / "test.beton"),
        "representation": kind,
        "labels_per_class": LABELS_PER_CLASS,
    }
    return {
        "knn": accuracies("knn", KNNConfig(**common)),
        "linear": accuracies("logistic", LogisticConfig(**common, penalty="fixed")),
    }


def accuracies(protocol: str, config: EvaluationConfig) -> Accuracies:
    """Top-1 as a protocol finds it; its result is written into the run directory."""
    result, _ = evaluate(PROTOCOLS[protocol], config)
    figures = record_of_figures(result)
    return {labels: {key: found["top1"][key] for key in ("mean", "std")} for labels, found in figures.items()}


def call(command: list[str | Path]) -> None:
    """Show a command and run it, from the project's root.

    Raises:
        RunFailed: it failed, and said why above.
    """
    words = [str(word) for word in command]
    print("$", shlex.join([Path(words[0]).name, *words[1:]]), flush=True)
    # DeepSpeed's launcher looks for its helpers on the PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = subprocess.run(words, check=False, env=os.environ | {"PATH": path}).returncode
    if code != 0:
        raise RunFailed(f"`{shlex.join(words)}` ended with code {code}; its own message stands above")


def summarize(accuracy: dict[str, Accuracies]) -> dict[str, Any]:
    """Means alone: kNN with all labels, linear by number of labels."""
    return {
        "knn": accuracy["knn"]["all"]["mean"],
        "linear": {labels: figure["mean"] for labels, figure in accuracy["linear"].items()},
        "knn_by_labels": {labels: figure["mean"] for labels, figure in accuracy["knn"].items()},
    }


def images_per_sec(run_dir: Path, global_batch_size: int) -> float:
    """Source images a second over the whole of training: all images over the time of all steps."""
    steps, seconds = 0, 0.0
    for line in read_metrics(run_dir):
        images = (line["step"] - steps) * global_batch_size
        steps, seconds = int(line["step"]), seconds + images / line["images_per_sec"]
    return steps * global_batch_size / seconds


def table(accuracy: dict[Representation, dict[str, Accuracies]]) -> str:
    """Accuracy in percent, mean ± standard deviation over subsets of the labels."""
    names = {"learned": "learned encoder", "random": "random encoder", "pixels": "raw pixels"}
    counts = [*map(str, LABELS_PER_CLASS), "all"]
    lines = [f"{'accuracy, %':16} {'labels a class:':>16} " + "".join(f"{count:>14}" for count in counts)]
    for classifier in CLASSIFIERS:
        for kind, figures in accuracy.items():
            cells = [figures[classifier][count] for count in counts]
            row = "".join(f"{100 * cell['mean']:8.1f} ± {100 * cell['std']:3.1f}" for cell in cells)
            lines.append(f"{names[kind]:16} {classifier:>16} {row}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
