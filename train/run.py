"""One training run, from its configuration to its last checkpoint: check, set up, train.

What `train/pretrain.py` starts, and the evaluations that train a network.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch

from model.activation_checkpointing import checkpoint_activations
from model.build import build_method, needs_labels
from model.methods.base import Method
from model.methods.distill import Distill
from model.norm import check_group_size, groups_of, set_group
from pipelines.augment import build_recipe
from pipelines.batch import Loader
from pipelines.build import Data, MissingPackage, build_loader, check_batch_size, open_data, whole_of
from train import determinism
from train.checkpoint import latest_checkpoint
from train.cli import UnfitEnvironment
from train.compilation import compile_encoder
from train.config import (
    PretrainConfig,
    check_micro_batch_size,
    check_run_dir,
    claim_run_dir,
)
from train.determinism import allow_fastest, make_deterministic
from train.engine import Engine, collective_timeout, init_process_group
from train.initial_encoder import load_initial_encoder
from train.interruption import Interruption
from train.labels import check_labels
from train.loaders import EpochLoaders
from train.loop import Pretraining
from train.metrics import check_sinks
from train.observation import Observation
from train.online.linear_probe import count_classes
from train.online.neighbour_sets import NeighbourSets, open_neighbour_sets
from train.optim.lars import LARS
from train.optim.lars_backends import check_backend
from train.optim.param_groups import param_groups
from train.preflight import preflight
from train.run_lock import locked_run_dir
from train.runtime import (
    Ranks,
    choose_device,
    configure_logging,
    cores_per_rank,
    keep_freed_memory,
    log_path,
    read_ranks,
)
from train.schedule import num_warmup_steps, size_of_epoch
from train.starts import record_start
from train.teacher import check_teacher, load_teacher
from train.watchdog import Watchdog


class Checked(NamedTuple):
    """What is known before anything is allocated."""

    config: PretrainConfig
    ranks: Ranks
    device: torch.device
    data: Data
    steps_per_epoch: int
    warmup_steps: int
    num_probe_classes: int | None
    neighbours: NeighbourSets | None


def train(config: PretrainConfig, interruption: Interruption) -> None:
    """Check a run, set it up and train it to its end, from its newest checkpoint if it has one. All ranks must call.

    Everything that the user could have got wrong is checked before a process group, a model or a folder exists. Several
    runs may follow one another in a process.

    Args:
        config: the run's; with its data, method, optimizer and directory.
        interruption: what listens to signals while there is something to save.

    Raises:
        ValueError: the configuration, the data or the run directory cannot be used.
        OSError: likewise.
        UnfitEnvironment: this machine lacks something.
        RunStopped: the run did not come to its end.
    """
    checked = check(config, read_ranks())
    set_up_machine(checked)
    with closing(build_loaders(checked)) as loaders:
        _train(checked, loaders, interruption)


def check(config: PretrainConfig, ranks: Ranks) -> Checked:
    """Refuse what cannot run."""
    data = open_data(config.data)
    check_batch_size(config.data.global_batch_size, ranks.world_size, data.num_samples)
    check_micro_batch_size(config, ranks.world_size)
    check_group_size(config.model.norm_group_size, ranks.world_size)
    if needs_labels(config.model):
        check_labels(data, config.model.classifier.num_classes, path=config.data.path)
    check_teacher(config, data)
    steps_per_epoch = data.num_samples // config.data.global_batch_size
    total_steps = config.train.epochs * steps_per_epoch
    warmup_steps = num_warmup_steps(config.schedule, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    device = choose_device(config.train.device, ranks)
    check_backend(config.optim.backend, config.optim.form, device)
    if ranks.rank == 0:
        check_sinks(config.log)
    check_run_dir(config)
    return Checked(
        config=config,
        ranks=ranks,
        device=device,
        data=data,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        num_probe_classes=count_classes(whole_of(data)) if config.online.linear_probe else None,
        neighbours=open_neighbour_sets(config.online, config.data),
    )


def set_up_machine(checked: Checked) -> None:
    """Threads, memory and arithmetic of this process, as the run asks for them."""
    train = checked.config.train
    torch.set_num_threads(train.cpu_threads or cores_per_rank(checked.ranks))
    if checked.device.type == "cpu":
        keep_freed_memory()
    if train.deterministic:
        make_deterministic()
    else:
        allow_fastest()
    if train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # torch's default would compute convolutions with 10 bits


def build_loaders(checked: Checked) -> EpochLoaders:
    """The loaders of this rank's batches.

    Raises:
        ValueError: the data do not fit the loader, or the memory.
        UnfitEnvironment: the loader's package is missing.
    """
    config, ranks = checked.config, checked.ranks

    def build(side: int) -> Loader:
        return build_loader(
            config.data,
            checked.data,
            build_recipe(replace(config.augment, size=side)),
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=checked.device,
            dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
            num_cores=cores_per_rank(ranks),
        )

    def side_of(epoch: int) -> int:
        return size_of_epoch(config.schedule, epoch, config.augment.size)

    try:
        return EpochLoaders(build, side_of, config.train.epochs)
    except MissingPackage as error:
        raise UnfitEnvironment(str(error)) from error


def _train(checked: Checked, loaders: EpochLoaders, interruption: Interruption) -> None:
    config, ranks, timeout_s = checked.config, checked.ranks, checked.config.train.hang_timeout_s
    method = initial_method(config)
    init_process_group(checked.device, timeout_s)
    preflight(ranks, config=config, data_identity=loaders.identity())
    claim_run_dir(config)
    console = configure_logging(config.run_dir, ranks)
    with (
        locked_run_dir(config.run_dir, enabled=ranks.rank == 0),
        Watchdog(ranks, timeout_s=timeout_s, log_file=log_path(config.run_dir, ranks)) as watchdog,
    ):
        try:
            watchdog.beat(0, "building the engine")
            engine = build_engine(config, method, ranks, checked.device)
            observation = Observation(
                config,
                method,
                ranks,
                checked.device,
                num_classes=checked.num_probe_classes,
                neighbours=checked.neighbours,
                warmup_steps=checked.warmup_steps,
            )
            interruption.begin(ranks, collective_timeout(timeout_s))
            pretraining = Pretraining(
                config,
                method,
                engine,
                loaders,
                ranks,
                observation=observation,
                steps_per_epoch=checked.steps_per_epoch,
                console=console,
                watchdog=watchdog,
                interruption=interruption,
            )
            watchdog.beat(0, "resuming")
            pretraining.restore()
            pretraining.check_ranks_agree()
            if ranks.rank == 0 and pretraining.step < pretraining.total_steps:
                record_start(config.run_dir, ranks, checked.device, step=pretraining.step)
            pretraining.run()
        except RuntimeError as error:
            # A collective tells that some rank is gone, not which.
            explained = watchdog.explain(error) or determinism.explain(error)
            if explained is None:
                raise
            raise explained from error


def initial_method(config: PretrainConfig) -> Method:
    """With the weights that a new run starts from, on the CPU."""
    method = build_method(config.model, config.seed)
    if config.train.initial_encoder is not None and latest_checkpoint(config.run_dir) is None:
        load_initial_encoder(config.train.initial_encoder, method, config.train.initial_encoder_sha256)
    if isinstance(method, Distill):
        load_teacher(config, method)
    return method


def build_engine(config: PretrainConfig, method: Method, ranks: Ranks, device: torch.device) -> Engine:
    """The engine that trains `method`, which it moves to the device. All ranks must call; the process group exists."""
    train, optim = config.train, config.optim
    set_group(method, groups_of(config.model.norm_group_size, collective_timeout(train.hang_timeout_s)))
    if train.activation_checkpointing:
        checkpoint_activations(method.encoder)
    compile_encoder(method.to(device), train.compile)
    optimizer = LARS(
        param_groups(method, optim.weight_decay, not_adapted=("",) if optim.name == "sgd" else method.not_adapted),
        lr=0.0,  # the schedule sets it before each step
        momentum=optim.momentum,
        trust_coefficient=optim.trust_coefficient,
        form=optim.form,
        nesterov=optim.nesterov,
        backend=optim.backend,
    )
    return Engine(
        method,
        optimizer,
        ranks=ranks,
        device=device,
        precision=train.precision,
        local_batch_size=config.data.global_batch_size // ranks.world_size,
        micro_batch_size=train.micro_batch_size,
        zero_stage=train.zero_stage,
        gradient_clipping=train.gradient_clipping,
        on_nonfinite=train.on_nonfinite,
    )
