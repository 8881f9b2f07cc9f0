"""The training loop: epochs of batches from the loader, through the engine, into metrics and checkpoints.

It reads from top to bottom; what can be a pure function of the step is one. A run is resumed by loading the latest
checkpoint of its directory and going on with the next batch of the same epoch.
"""

from __future__ import annotations

import logging
import time
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from model.methods.base import Method
from pipelines.batch import Batch, Loader
from train.checkpoint import (
    Checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from train.config import PretrainConfig, norm_batch_size, resolved_dict, summary
from train.engine import Engine
from train.metrics import MetricsWriter
from train.optim.lars import peak_lr
from train.runtime import Ranks, package_versions
from train.schedule import learning_rate

logger = logging.getLogger(__name__)


class Stopwatch:
    """Times the steps since the last line of metrics: images a second, and the share spent waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0
        self._waiting = 0.0

    def record(self, num_images: int, waited: float) -> None:
        """Count one step: images over all ranks, and the seconds in which this rank waited for them."""
        self._images += num_images
        self._waiting += waited

    def read(self) -> dict[str, float]:
        """What was measured since the last reading; starts again."""
        elapsed = time.perf_counter() - self._start
        figures = {"images_per_sec": self._images / elapsed, "data_wait": self._waiting / elapsed}
        self._start, self._images, self._waiting = time.perf_counter(), 0, 0.0
        return figures


class Pretraining:
    """A run between its set-up and its end.

    Args:
        config: the run's.
        method: what is trained; its weights are those of the seed until `restore` replaces them.
        engine: steps it.
        loader: of this rank's batches.
        ranks: of this process.
        warmup_steps: of the learning rate.
    """

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        engine: Engine,
        loader: Loader,
        ranks: Ranks,
        *,
        warmup_steps: int,
    ) -> None:
        self.config, self.method = config, method
        self.engine, self.loader, self.ranks = engine, loader, ranks
        self.step = 0  # optimizer steps done
        self.steps_per_epoch = len(loader)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.warmup_steps = warmup_steps
        self.peak_lr = peak_lr(config.optim, config.data.global_batch_size)
        self.norm_batch_size = norm_batch_size(config, ranks.world_size)
        self._start = (0, 0)  # epoch and batch

    def restore(self) -> None:
        """Go to where the run's latest checkpoint stands; stay at the start where there is none.

        Raises:
            ValueError: the checkpoint is damaged, foreign, or of other data.
        """
        path = latest_checkpoint(self.config.run_dir)
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        found = checkpoint.position.get("norm_batch_size", self.config.data.global_batch_size)
        if found != self.norm_batch_size:
            raise ValueError(
                f"{path} was trained with batch norm over {found} images, which `train.micro_batch_size` and "
                f"`model.norm_group_size` on {self.ranks.world_size} ranks make {self.norm_batch_size}; resume with "
                "values, or on a number of ranks, that make them as many"
            )
        self._start = self.loader.load_state_dict(checkpoint.loader)
        self.engine.load_parameters(checkpoint.model)
        self.engine.load_optimizer_state(checkpoint.optimizer)
        self.step = checkpoint.position["step"]
        logger.info("resuming from %s: epoch %d, batch %d", path, *self._start)

    def check_ranks_agree(self) -> None:
        """Refuse to go on where ranks stand at different steps. All ranks must call.

        Raises:
            ValueError: some ranks do not see the run directory that the others see.
        """
        mean = self.engine.mean_over_ranks({"step": torch.tensor(float(self.step))})["step"]
        if mean != self.step:
            raise ValueError(
                f"all ranks must resume from one checkpoint, got step {self.step} on rank {self.ranks.rank} and "
                f"{mean:g} on average; put `runs_dir` on a file system that all machines share"
            )

    def run(self) -> None:
        """Train until the last epoch is done. All ranks must call."""
        is_main = self.ranks.rank == 0
        logger.info("%s", summary(self.config, self.ranks.world_size))
        with (
            MetricsWriter(self.config.run_dir, enabled=is_main, resume_step=self.step) as writer,
            tqdm(
                total=self.total_steps,
                initial=self.step,
                unit="step",
                desc=self.config.name,
                disable=not is_main,
                dynamic_ncols=True,
                mininterval=1.0,
            ) as bar,
        ):
            first_epoch, first_batch = self._start
            for epoch in range(first_epoch, self.config.train.epochs):
                self._run_epoch(epoch, first_batch if epoch == first_epoch else 0, writer, bar)
        logger.info("done: %d steps", self.step)

    def _run_epoch(self, epoch: int, start_batch: int, writer: MetricsWriter, bar: tqdm[NoReturn]) -> None:
        train = self.config.train
        batches = self.loader.epoch(epoch, start_batch)
        watch = Stopwatch()
        for done in range(start_batch + 1, self.steps_per_epoch + 1):
            asked = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - asked
            metrics, lr = self._train_step(batch)
            watch.record(self.config.data.global_batch_size, waited)
            bar.update()
            saving = done == self.steps_per_epoch or (
                train.checkpoint_every > 0 and self.step % train.checkpoint_every == 0
            )
            if saving or self.step % train.log_every == 0:  # no checkpoint without a look at the loss
                self.engine.check_finite()
                means = self.engine.mean_over_ranks(metrics)
                self._log(writer, bar, {"epoch": epoch, "lr": lr} | means | watch.read())
            if saving:
                self._save()

    def _train_step(self, batch: Batch) -> tuple[dict[str, Tensor], float]:
        lr = learning_rate(
            self.step, peak_lr=self.peak_lr, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )
        loss, metrics = self.engine.train_step(batch.views, lr=lr, step=self.step + 1)
        self.step += 1
        self.method.after_step(self.step)
        return {"loss": loss} | metrics, lr

    def _log(self, writer: MetricsWriter, bar: tqdm[NoReturn], metrics: dict[str, float]) -> None:
        writer.write(self.step, metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", img_s=f"{metrics['images_per_sec']:.0f}", refresh=False)

    def _save(self) -> None:
        """Write a checkpoint on rank 0; the state is the same on all ranks, which must all call."""
        optimizer_state = self.engine.optimizer_state()
        if self.ranks.rank != 0:
            return
        checkpoint = Checkpoint(
            model=self.method.state_dict(),
            optimizer=optimizer_state,
            position={"step": self.step, "norm_batch_size": self.norm_batch_size},
            config=resolved_dict(self.config),
            versions=package_versions(),
            loader=self.loader.state_dict(),
        )
        save_checkpoint(checkpoint_path(self.config.run_dir, self.step), checkpoint)
        prune_checkpoints(self.config.run_dir, self.config.train.keep_checkpoints)
