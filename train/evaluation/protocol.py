"""What every evaluation is told, the protocols that there are, and what one of them finds out.

A protocol's module is imported when the protocol is asked for: some stand on packages that take seconds.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from train.evaluation.results import Result, identify, write_result
from train.initial_encoder import Weights, Which, find_checkpoint
from train.runtime import read_ranks

logger = logging.getLogger(__name__)

__all__ = ["PROTOCOLS", "EvaluationConfig", "Protocol", "Representation", "Result", "evaluate", "write_result"]

Representation = Literal["learned", "random", "pixels"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, and on which data."""

    checkpoint: str
    """A checkpoint of a run or of `tools.import_checkpoint`, or a run directory, in which `which` chooses."""
    train_data: str
    """What labels are learned from: a `.beton`, or a folder with one folder for each class."""
    test_data: str
    """What accuracy is measured on, likewise, with the same classes."""
    which: Which = "latest"
    """Of a run directory: the latest checkpoint, or the best by `train.keep_best` (by the loss, where that is none)."""
    weights: Weights = "live"
    """Of the checkpoint: those of the last step, or their moving average (`train.ema_decay`)."""
    representation: Representation = "learned"
    """`learned`; `random`: the network that the run started from; `pixels`: none at all."""
    head_layers: int = 0
    """Layers of the projection head that are kept: 0 gives h, the encoder's output; −1 all of them, z."""
    batch_size: int = 256
    """Images that go through the encoder at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU if there is one."""
    seed: int = 0
    """Of whatever the protocol draws."""
    cache: bool = True
    """Keep representations in `evaluation/features/` of the run directory, for whoever asks for the same ones next."""
    output_dir: str | None = None
    """Where the result is written; by default `evaluation/` in the run directory, or in a folder named as a checkpoint
    that is in none."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.head_layers < -1:
            raise ValueError(f"`head_layers` must be −1 (all) or more, got {self.head_layers}; 0 is h")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2**63 − 1, got {self.seed}")
        if self.weights == "average" and self.representation != "learned":
            raise ValueError(f"`weights` average needs `representation` learned, got {self.representation}")
        if self.head_layers and self.representation == "pixels":
            raise ValueError(f"`head_layers` must be 0 with `representation` pixels, got {self.head_layers}")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One subcommand of `train/evaluate.py`."""

    name: str
    help: str
    module: str
    """Below `train.evaluation`."""
    config_name: str
    """Of the configuration in that module, a dataclass that extends `EvaluationConfig`."""
    run_name: str
    """Of the function from such a configuration to a `Result`."""
    supports_ranks: bool
    """Whether a launcher may start several ranks of it."""

    @property
    def config_class(self) -> type[EvaluationConfig]:
        """What the protocol is told."""
        found: type[EvaluationConfig] = getattr(self._module, self.config_name)
        return found

    @property
    def run(self) -> Callable[[EvaluationConfig], Result]:
        """The protocol itself."""
        found: Callable[[EvaluationConfig], Result] = getattr(self._module, self.run_name)
        return found

    @property
    def _module(self) -> object:
        return importlib.import_module(f"train.evaluation.{self.module}")


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="knn",
            help="weighted k-nearest neighbours of frozen features",
            module="knn_protocol",
            config_name="KNNConfig",
            run_name="run_knn",
            supports_ranks=False,
        ),
        Protocol(
            name="linear",
            help="a linear classifier of frozen features by SGD, as the SimCLR papers",
            module="linear_protocol",
            config_name="LinearConfig",
            run_name="run_linear",
            supports_ranks=True,
        ),
        Protocol(
            name="logistic",
            help="multinomial logistic regression of frozen features by L-BFGS",
            module="logistic_protocol",
            config_name="LogisticConfig",
            run_name="run_logistic",
            supports_ranks=False,
        ),
        Protocol(
            name="finetune",
            help="train the whole network on few labels, or all",
            module="finetune",
            config_name="FinetuneConfig",
            run_name="run_finetune",
            supports_ranks=True,
        ),
        Protocol(
            name="transfer",
            help="another labelled set: logistic regression or fine-tuning",
            module="transfer",
            config_name="TransferConfig",
            run_name="run_transfer",
            supports_ranks=True,
        ),
        Protocol(
            name="distill",
            help="train a student on what a fine-tuned network says of unlabelled images",
            module="distill",
            config_name="DistillationConfig",
            run_name="run_distillation",
            supports_ranks=True,
        ),
        Protocol(
            name="supervised",
            help="the same network, trained with labels from the start",
            module="supervised",
            config_name="SupervisedConfig",
            run_name="run_supervised",
            supports_ranks=True,
        ),
    )
}


def evaluate(protocol: Protocol, config: EvaluationConfig) -> tuple[Result, Path | None]:
    """Run a protocol and write what it found. All ranks must call.

    Returns:
        The result, and its file, which rank 0 writes; None on the others.

    Raises:
        ValueError: the configuration or the data cannot be used; or several ranks were started of what runs in one.
        OSError: something could not be read or written.
    """
    ranks = read_ranks()
    if not protocol.supports_ranks:
        check_single_process(f"`evaluate.py {protocol.name}`")
    _check_sets(config)
    # Once: while a run goes on, its latest checkpoint is soon another one.
    path = find_checkpoint(Path(config.checkpoint), config.which) if config.checkpoint else None
    if config.output_dir is not None and Path(config.output_dir).exists() and not Path(config.output_dir).is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {config.output_dir}; name another one")
    # Before, not after: by then training may have removed the file.
    identity = identify(path) if ranks.rank == 0 else None
    result = protocol.run(config if path is None else replace(config, checkpoint=str(path), which="latest"))
    return result, None if identity is None else write_result(result, config, identity)


def _check_sets(config: EvaluationConfig) -> None:
    for name in ("train_data", "test_data"):
        if not getattr(config, name):
            raise ValueError(f"`{name}` must name a .beton or a folder with one folder for each class, got nothing")
    if Path(config.train_data).absolute() == Path(config.test_data).absolute():
        logger.warning("`test_data` is `train_data`: the figures are of images that were learned from, not of new ones")


def check_single_process(what: str) -> None:
    """Refuse to go on as one of several ranks.

    Args:
        what: is being evaluated, for the message.

    Raises:
        ValueError: as said, on every rank.
    """
    world_size = read_ranks().world_size
    if world_size > 1:
        raise ValueError(f"{what} must run in one process, got {world_size} ranks; start it by `python`, without them")
