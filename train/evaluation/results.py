"""What an evaluation found, and the JSON file that keeps it; docs/guides/evaluation.md explains every key.

A figure that was measured with several seeds is kept for each of them, with mean, sample standard deviation and the
interval of the mean; of a single one, the interval is that of a share on a test set of this size.

A file is never replaced by the result of another evaluation: its name tells protocol, representation, weights, head,
checkpoint and the protocol's own suffix apart, and where a file of that name is of other data or with other options, or
in a folder of results of another run, a digest of these is added.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.manifest import file_sha256
from train.checkpoint import read_sections
from train.evaluation.classification import LEVEL, ClassificationMetrics, over_seeds
from train.evaluation.labelled_data import identity_of
from train.initial_encoder import find_checkpoint, results_dir
from train.runtime import package_versions

if TYPE_CHECKING:
    from train.evaluation.protocol import EvaluationConfig

FORMAT = "twinview-evaluation"
VERSION = 1
ALL_LABELS = "all"
NO_OPTIONS = frozenset(
    {"format", "format_version", "protocol", "suffix", "checkpoint", "checkpoint_step", "checkpoint_sha256", "data"}
    | {"accuracy", "figures", "chosen", "chosen_by", "tried", "details", "versions"}
    | {"train_data", "test_data", "which", "weights", "representation", "head_layers"}
    | {"batch_size", "device", "cache", "output_dir"}
)
"""Keys of a record that say what was evaluated, where, and what was found."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a protocol found out."""

    protocol: str
    """Its name."""
    figures: Mapping[str, Sequence[ClassificationMetrics]]
    """By the amount of labels ("1" a class, "1%" of them, "all"): one for each seed."""
    seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By the amount of labels: the seed of each; where it is missing, 0 and up."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Settings that were chosen among several, by their names; JSON values."""
    chosen_by: str = "given in advance"
    """How they were chosen, in words: on which split, by which figure."""
    tried: Sequence[Mapping[str, Any]] = ()
    """Every setting that was tried, with the figure that it was judged by; JSON values."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the protocol has to say; JSON values."""
    suffix: str = ""
    """Tells the file's name apart from those of the same protocol with other settings, for instance `10%`."""
    folder: Path | None = None
    """Where the file is put, unless `output_dir` says; None: `evaluation/` in the run directory."""
    leftovers: Sequence[Path] = ()
    """Folders from which the evaluation would go on if it were cut off: removed when the result is written."""


def write_result(result: Result, config: EvaluationConfig, identity: Mapping[str, Any] | None = None) -> Path:
    """Write a result as JSON, whole or not at all. On one rank.

    Args:
        result: what was found.
        config: what was asked for.
        identity: of the checkpoint, from `identify` when the evaluation began: training may have removed the file
            since; None: of the one that `config` names now.

    Returns:
        The file.

    Raises:
        ValueError: there is no such checkpoint, or a set is not as it was.
        OSError: it could not be written.
    """
    if identity is None:
        identity = identify(find_checkpoint(Path(config.checkpoint), config.which) if config.checkpoint else None)
    record = record_of(result, config, identity)
    path = _free_path(_folder(result, config, identity["checkpoint"]), _stem(result, config), record)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    for leftover in result.leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return path


def record_of(result: Result, config: EvaluationConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file."""
    figures = record_of_figures(result)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "protocol": result.protocol,
        "suffix": result.suffix,
        **asdict(config),
        **identity,
        "data": {"train": identity_of(config.train_data, "train"), "test": identity_of(config.test_data, "test")},
        "accuracy": {labels: {key: f["top1"][key] for key in ("mean", "std")} for labels, f in figures.items()},
        "figures": figures,
        "chosen": dict(result.chosen),
        "chosen_by": result.chosen_by,
        "tried": [dict(setting) for setting in result.tried],
        "details": dict(result.details),
        "versions": package_versions(),
    }


def record_of_figures(result: Result) -> dict[str, dict[str, Any]]:
    """The figures by amount of labels, over their seeds."""
    return {
        labels: _over_seeds(measured, result.seeds.get(labels, range(len(measured))))
        for labels, measured in result.figures.items()
    }


def options_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the protocol was told beside what it evaluates: settings that can move a figure."""
    return {key: value for key, value in record.items() if key not in NO_OPTIONS}


def labels_in_words(labels: str) -> str:
    """A key of `Result.figures`, for people."""
    if labels == ALL_LABELS:
        return "all labels"
    if labels.endswith("%"):
        return f"{labels} of the labels"
    return f"{labels:>3} label{'s' * (labels != '1')} a class" if labels.isdigit() else f"labels of {labels}"


def sha256_of(path: Path) -> str:
    """The digest of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return file_sha256(file)


def identify(checkpoint: Path | None) -> dict[str, Any]:
    """Which checkpoint is evaluated, as the record has it.

    Raises:
        ValueError: it is missing or damaged.
        OSError: it cannot be read.
    """
    if checkpoint is None:
        return {"checkpoint": None, "checkpoint_step": None, "checkpoint_sha256": None}
    step = read_sections(checkpoint)["position"].get("step")
    return {"checkpoint": str(checkpoint), "checkpoint_step": step, "checkpoint_sha256": sha256_of(checkpoint)}


def _over_seeds(measured: Sequence[ClassificationMetrics], seeds: Sequence[int]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "num_seeds": len(measured),
        "seeds": list(seeds),
        "num_test_samples": measured[0].num_samples,
    }
    for name in ("top1", "top5", "mean_per_class"):
        values = [float(getattr(metrics, name)) for metrics in measured]
        figures[name] = asdict(over_seeds(values)) | {"by_seed": values}
        if (interval := figures[name]["confidence_interval"]) is not None:
            figures[name]["confidence_interval"] = [max(0.0, interval[0]), min(1.0, interval[1])]
    if len(measured) == 1:
        figures["top1"]["confidence_interval"] = list(measured[0].confidence_interval)
    figures["interval"] = {"level": LEVEL, "kind": "wilson" if len(measured) == 1 else "student_t"}
    figures["per_class"] = {
        name: {"count": figure.count, "accuracy": _mean([metrics.per_class[name].accuracy for metrics in measured])}
        for name, figure in measured[0].per_class.items()
    }
    return figures


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _folder(result: Result, config: EvaluationConfig, checkpoint: str | None) -> Path:
    if config.output_dir is not None:
        return Path(config.output_dir)
    if result.folder is not None:
        return result.folder
    if checkpoint is None:
        raise ValueError("`output_dir` must say where the result of no checkpoint is written, got null; name a folder")
    return results_dir(Path(checkpoint)) / "evaluation"


def _stem(result: Result, config: EvaluationConfig) -> str:
    """The file's name, but for what may be added."""
    parts = [result.protocol, config.representation]
    if config.weights == "average":
        parts.append("average")
    if config.head_layers:
        parts.append("z" if config.head_layers < 0 else f"head{config.head_layers}")
    checkpoint = Path(config.checkpoint)
    if config.which != "latest":
        parts.append(config.which)
    elif checkpoint.absolute().parent.name == "checkpoints":  # one of a run's: the run's latest goes without its name
        parts.append(checkpoint.stem)
    if result.suffix:
        parts.append(re.sub(r"[^\w.%+-]+", "_", result.suffix))
    return "-".join(parts)


def _free_path(folder: Path, stem: str, record: dict[str, Any]) -> Path:
    """The file of that name; with a digest of the evaluation's subject, where it holds a result on something else."""
    path = folder / f"{stem}.json"
    subject = _subject(record)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return path
    except ValueError:
        found = None
    if isinstance(found, dict) and _subject(found) == subject:
        return path
    return folder / f"{stem}-{hashlib.sha256(json.dumps(subject).encode()).hexdigest()[:8]}.json"


def _subject(record: Mapping[str, Any]) -> list[Any]:
    """What two results must share for the later to replace the earlier."""
    checkpoint = record.get("checkpoint")
    told = json.dumps([record.get("data"), options_of(record)], sort_keys=True)
    return [told, checkpoint and str(results_dir(Path(checkpoint)))]
