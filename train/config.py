"""The configuration of a pretraining run: YAML plus dotted overrides, checked before anything is allocated.

Each part of the product keeps its own configuration beside its code; this file puts them together, parses them, and
checks what only concerns several parts at once. The resolved configuration is written into the run directory, and a
run directory belongs to one configuration.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from model.build import ModelConfig, num_views
from pipelines.augment import AugmentConfig, build_recipe
from pipelines.build import DataConfig
from train.checkpoint_keeping import KeepBest, KeepConfig
from train.cli import parse
from train.compilation import CompileMode
from train.metrics import LogConfig
from train.online.config import OnlineConfig
from train.optim.lars import LARSConfig
from train.plain_yaml import load_plain_yaml
from train.schedule import ScheduleConfig, check_sizes

CONFIG_FILE = "config.yaml"
_ONE_AT_A_TIME = threading.Lock()  # jsonargparse misses options where threads build parsers at once

ADJUSTABLE = frozenset(
    {
        "runs_dir",
        "data.path",  # a set may move; the loader's state proves that it is the same one
        "data.subset.list",  # so may these, by their checksums
        "data.labelled.list",
        "data.num_threads",
        "data.batches_ahead",
        "data.on_error",
        "train.cpu_threads",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.keep_best",
        "train.keep_every_epochs",
        "train.background_checkpoints",
        "train.hang_timeout_s",
        "train.zero_stage",
        "train.activation_checkpointing",
        "train.compile",
        "train.deterministic",
        "model.exchange",
        "optim.backend",
        "train.on_nonfinite",
    }
)
"""What may differ when a run is resumed: what machine it runs on, not what it learns (but for rounding, and for the
samples that `on_error: skip` replaces)."""
ADJUSTABLE_SECTIONS = ("online.", "log.")
"""Likewise, whole: what watches the encoder, not what trains it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop and its machine."""

    epochs: int = 100
    """Passes over the set."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPUs that there are, else the CPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16`: autocast to bfloat16, with float32 weights, losses and statistics."""
    zero_stage: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO: 0 keeps gradients and momentum whole on every rank; 1 shares the momentum (and a float32 copy
    of the parameters) out among the ranks, 2 the gradients too. The result is the same to rounding."""
    micro_batch_size: int | None = None
    """Images that a rank takes through the network at a time; null: all of its share of the batch. The loss and its
    gradients stay those of the global batch; batch norm's statistics become those of a micro-batch."""
    gradient_clipping: float = 0.0
    """Largest norm of the whole gradient, which is scaled down to it; 0: as it is. SimCLR does not clip."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """At NaN or infinity in the projections or the loss: stop the run, or leave that step out."""
    cpu_threads: int = 0
    """Threads that each rank computes with on the CPU; 0: its share of the machine's cores."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, beside the one at the end of each epoch; 0: those alone."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    keep_best: KeepBest = "none"
    """Also keep the checkpoint of the epoch with the lowest mean loss, or with the highest accuracy of the online probe
    or of nearest neighbours."""
    keep_every_epochs: int = 0
    """Also keep the checkpoint of every so many epochs; 0: of none."""
    background_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in host memory; else training waits."""
    hang_timeout_s: float = 600.0
    """Seconds without any progress after which a rank is given up for hung, and the run ended with its name; 0: never.
    Compiling, saving and evaluating count as one step of progress each."""
    ema_decay: float = 0.0
    """Keep a moving average of the weights beside them, which evaluation and export can take: average ← decay ·
    average + (1 − decay) · weights, after each step; 0: none."""
    activation_checkpointing: bool = False
    """Keep only the input of each residual block (and the stem) for the backward pass, and compute its inside again:
    less memory, about a third more time; the same gradients."""
    compile: CompileMode = "off"
    """Compile the encoder with `torch.compile`, in one of its modes; `reduce-overhead` uses CUDA graphs."""
    deterministic: bool = False
    """Only operations that give the same bits each time; on GPUs slower. On the CPU runs are so anyway."""
    teacher: str | None = None
    """Of `model.method` distill: the run, or checkpoint, of the classifier network to learn from."""
    teacher_sha256: str | None = None
    """Digest of the teacher's file, as `sha256sum` prints it, for a run that no other teacher may go on with; null: of
    any."""
    initial_encoder: str | None = None
    """A checkpoint whose encoder a new run starts from, of a run or as `python -m tools.import_checkpoint` writes it;
    with `model.method` supervised also the layers of the projection head that are kept."""
    initial_encoder_sha256: str | None = None
    """Digest of that file, likewise."""

    @property
    def keep(self) -> KeepConfig:
        """Which checkpoints stay."""
        return KeepConfig(last=self.keep_checkpoints, best=self.keep_best, every_epochs=self.keep_every_epochs)

    def __post_init__(self) -> None:
        for name, low in (
            ("epochs", 1),
            ("cpu_threads", 0),
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("keep_every_epochs", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"`train.{name}` must be at least {low}, got {getattr(self, name)}")
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(
                f"`train.zero_stage` must be 0, 1 or 2, got {self.zero_stage}; 3 would share parameters out"
            )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"`train.micro_batch_size` must be null or at least 1, got {self.micro_batch_size}")
        if not 0.0 <= self.hang_timeout_s <= 1e9:  # what torch.distributed takes ends soon above
            raise ValueError(f"`train.hang_timeout_s` must be from 0 to 1e9, got {self.hang_timeout_s}; 0: off")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                f"`train.ema_decay` must be in [0, 1), got {self.ema_decay}; usual: 0.99 to 0.9999; 0: none"
            )
        if self.deterministic and self.compile == "max-autotune":
            raise ValueError(
                "`train.deterministic` must be false with `train.compile` max-autotune, which chooses kernels by time; "
                "got true; compile in another mode"
            )
        if not 0.0 <= self.gradient_clipping < math.inf:
            raise ValueError(
                f"`train.gradient_clipping` must be finite and not negative, got {self.gradient_clipping}; 0: none"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pretraining run."""

    name: str
    """Of the run; its directory is `runs_dir/name`."""
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: LARSConfig = LARSConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    online: OnlineConfig = OnlineConfig()
    log: LogConfig = LogConfig()
    seed: int = 0
    """Of the weights, the order and every view."""
    runs_dir: str = "runs"
    """Where run directories are made."""

    def __post_init__(self) -> None:
        if self.name in {"", ".."} or Path(self.name).name != self.name:
            raise ValueError(f"`name` must be a plain folder name, got {self.name!r}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2**63 − 1, got {self.seed}")
        if self.model.method == "simclr" and self.data.global_batch_size < 2:
            raise ValueError("`data.global_batch_size` must be at least 2, got 1; one image has no negatives")
        num_drawn, num_taken = len(build_recipe(self.augment).views), num_views(self.model)
        if num_drawn != num_taken:
            raise ValueError(
                f"`augment.recipe` must draw the {num_taken} views of each image that {self.model.method} takes, "
                f"got {self.augment.recipe}, which draws {num_drawn}"
            )
        if (self.model.method == "distill") != (self.train.teacher is not None):
            raise ValueError(
                f"`train.teacher` belongs to `model.method` distill, got {self.train.teacher} with "
                f"{self.model.method}; name the run of the network to learn from, or none"
            )
        check_sizes(self.schedule, num_epochs=self.train.epochs, size=self.augment.size)
        self._check_best()

    def _check_best(self) -> None:
        best = self.train.keep_best
        if best == "probe_accuracy" and not self.online.linear_probe:
            raise ValueError("`train.keep_best` probe_accuracy needs `online.linear_probe`, got false")
        if best == "knn_accuracy" and not self.online.knn_every_epochs:
            raise ValueError("`train.keep_best` knn_accuracy needs `online.knn_every_epochs`, got 0")

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return Path(self.runs_dir) / self.name


def check_micro_batch_size(config: PretrainConfig, world_size: int) -> None:
    """Refuse micro-batches that do not make up a rank's share of the batch.

    Raises:
        ValueError: as said; names the nearest sizes that do.
    """
    local, micro = config.data.global_batch_size // world_size, config.train.micro_batch_size
    if micro is None or local % micro == 0:
        return
    below = max(size for size in range(1, min(micro, local) + 1) if local % size == 0)
    above = min((size for size in range(micro, local + 1) if local % size == 0), default=below)
    use = f"{below} or {above}" if above != below else f"{below}"
    raise ValueError(
        f"`train.micro_batch_size` must divide a rank's share of the batch, {local} images, got {micro}; use {use}"
    )


def norm_batch_size(config: PretrainConfig, world_size: int) -> int:
    """Images whose views share batch norm's statistics: of a micro-batch, on the ranks of a group."""
    local = config.data.global_batch_size // world_size
    return (config.train.micro_batch_size or local) * (config.model.norm_group_size or world_size)


def summary(config: PretrainConfig, world_size: int) -> str:
    """What a run computes and how, in a line for its log."""
    model, optim, train = config.model, config.optim, config.train
    local = config.data.global_batch_size // world_size
    pieces = local // (train.micro_batch_size or local)
    loss = "cross-entropy" if model.method != "simclr" else f"{model.loss}{', semi-hard' * model.semi_hard}"
    return (
        f"{model.method} on {world_size} ranks of {local} images in {pieces} micro-batches; {train.precision}; "
        f"ZeRO {train.zero_stage}; loss {loss}, {model.exchange}; batch norm over "
        f"{norm_batch_size(config, world_size)} images; {optim.name} {optim.form}{', Nesterov' * optim.nesterov}; "
        f"gradient clipping {train.gradient_clipping or 'none'}; on_nonfinite {train.on_nonfinite}"
    )


def parse_pretrain_config(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """Read `--config FILE.yaml` and `--section.field value` overrides; later ones win.

    Raises:
        ValueError: an unknown key or a value outside its choices; one line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="pretrain.py",
        description="Pretrain an encoder, without labels unless the method says so.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file; later arguments override it")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher; not used")
    parser.add_class_arguments(PretrainConfig)
    return _build(parser, parse(parser, arguments))


def config_from_dict(resolved: dict[str, Any]) -> PretrainConfig:
    """The configuration that a checkpoint or a run directory holds.

    Raises:
        ValueError: an unknown key or value, as from another version.
    """
    with _ONE_AT_A_TIME:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(PretrainConfig)
        return _build(parser, parse(parser, resolved))


def _build(parser: ArgumentParser, parsed: Namespace) -> PretrainConfig:
    keys = parser.get_defaults(skip_validation=True).keys()
    for section in sorted({key.rpartition(".")[0] for key in keys} - {""}):
        if not isinstance(parsed.get(section), Namespace):
            raise ValueError(f"`{section}` must hold options, got {parsed.get(section)}; `--help` lists them")
    values = parser.instantiate(parsed)
    return PretrainConfig(**{name: values[name] for name in PretrainConfig.__dataclass_fields__})


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration that a run directory holds.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir} holds no {CONFIG_FILE}; give the directory of a run")
    try:
        resolved = load_plain_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        resolved = None
    if not isinstance(resolved, dict):
        raise ValueError(f"{path} is damaged; remove {run_dir} to start over")
    return resolved


def check_run_dir(config: PretrainConfig) -> None:
    """Refuse a run directory that belongs to another run; one that is not there yet is free.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """
    path = config.run_dir / CONFIG_FILE
    if not path.exists():
        return
    ours, stored = flatten(asdict(config)), read_run_config(config.run_dir)
    try:  # an option that is newer than the run had its default's effect there
        stored = resolved_dict(config_from_dict(stored))
    except ValueError as error:
        raise ValueError(
            f"{path} was written by another version of Twinview ({error}); choose another `name`"
        ) from error
    theirs = flatten(stored)
    for key in sorted(ours.keys() | theirs.keys()):
        if not is_adjustable(key) and _plain(ours.get(key)) != theirs.get(key):
            raise ValueError(
                f"`{key}` is {theirs.get(key)} in {path} and {_plain(ours.get(key))} in this run; "
                f"choose another `name`, or remove {config.run_dir} to start over"
            )


def is_adjustable(key: str) -> bool:
    """Whether a field, such as `train.log_every`, may differ when a run is resumed."""
    return key in ADJUSTABLE or key.startswith(ADJUSTABLE_SECTIONS)


def claim_run_dir(config: PretrainConfig) -> None:
    """Make the run directory and write the resolved configuration, or check that it belongs to this run.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """
    check_run_dir(config)
    path = config.run_dir / CONFIG_FILE
    if path.exists():
        return
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"`runs_dir` must be a folder, found a file at {error.filename}; name another") from error
    temporary = path.with_suffix(f".{secrets.token_hex(8)}.tmp")  # not the process's number: hosts share the folder
    temporary.write_text(yaml.safe_dump(resolved_dict(config), sort_keys=False))
    temporary.replace(path)


def resolved_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as plain YAML values."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys such as `train.log_every`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
