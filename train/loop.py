"""The training loop: epochs of batches from the loader, through the engine, into metrics and checkpoints.

It reads from top to bottom; what can be a pure function of the step is one. A run is resumed by loading the newest
whole checkpoint of its directory and going on with the next batch of the same epoch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.ema import WeightAverage
from model.methods.base import Method
from pipelines.batch import Batch
from train.checkpoint import Checkpoint
from train.checkpoint_keeping import newest_whole_checkpoint
from train.checkpoint_writer import CheckpointWriter
from train.config import PretrainConfig, norm_batch_size, resolved_dict, summary
from train.console import Console
from train.engine import Engine
from train.interruption import Interruption, stopped
from train.loaders import EpochLoaders
from train.metrics import MetricsWriter
from train.observation import Observation
from train.optim.lars import peak_lr
from train.runtime import Ranks, package_versions
from train.schedule import learning_rate
from train.tallies import EPOCH_MEANS, EpochMeans, Stopwatch
from train.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Pretraining:
    """A run between its set-up and its end.

    Args:
        config: the run's.
        method: what is trained; its weights are those of the seed until `restore` replaces them.
        engine: steps it.
        loaders: of this rank's batches.
        ranks: of this process.
        observation: watches the encoder.
        steps_per_epoch: batches of every epoch.
        console: for the line of progress.
        watchdog: hears of every phase.
        interruption: tells when to stop.
    """

    def __init__(
        self,
        config: PretrainConfig,
        method: Method,
        engine: Engine,
        loaders: EpochLoaders,
        ranks: Ranks,
        *,
        observation: Observation,
        steps_per_epoch: int,
        console: Console,
        watchdog: Watchdog,
        interruption: Interruption,
    ) -> None:
        self.config, self.method = config, method
        self.engine, self.loaders, self.ranks = engine, loaders, ranks
        self.console, self.watchdog, self.interruption = console, watchdog, interruption
        self.step = 0  # optimizer steps done
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = config.train.epochs * steps_per_epoch
        self.peak_lr = peak_lr(config.optim, config.data.global_batch_size)
        self.norm_batch_size = norm_batch_size(config, ranks.world_size)
        self.versions = package_versions()
        self.average = WeightAverage(method, config.train.ema_decay) if config.train.ema_decay else None
        self.observation = observation
        self.epoch_means = EpochMeans()
        self._start = (0, 0)  # epoch and batch
        self._pending: tuple[int, dict[str, float]] | None = None  # an epoch whose end was cut off, and its last line

    def restore(self) -> bool:
        """Go to where the run's newest whole checkpoint stands; stay at the start where there is none.

        Returns:
            Whether there is one.

        Raises:
            ValueError: the checkpoints are damaged, foreign, or of other data.
        """
        found = newest_whole_checkpoint(self.config.run_dir)
        if found is None:
            return False
        path, checkpoint = found
        normed = checkpoint.position.get("norm_batch_size", self.config.data.global_batch_size)
        if normed != self.norm_batch_size:
            raise ValueError(
                f"{path} was trained with batch norm over {normed} images, which `train.micro_batch_size` and "
                f"`model.norm_group_size` on {self.ranks.world_size} ranks make {self.norm_batch_size}; resume with "
                "values, or on a number of ranks, that make them as many"
            )
        epoch, batch = self.loaders.load_state_dict(checkpoint.loader)
        pending = checkpoint.position.get("pending")
        self._pending = None if pending is None else (epoch, pending)
        self._start = (epoch, batch) if batch < self.steps_per_epoch else (epoch + 1, 0)
        self.engine.load_parameters(checkpoint.model)
        self.engine.load_optimizer_state(checkpoint.optimizer)
        if self.average is not None:
            self.average.load_state_dict(checkpoint.average)
        self.observation.load_state_dict(checkpoint.probe)
        if batch < self.steps_per_epoch or pending is not None:
            self.epoch_means.load_state_dict(checkpoint.position.get("epoch_means", {}))
        self.step = checkpoint.position["step"]
        logger.info("resuming from %s: epoch %d, batch %d", path, *self._start)
        return True

    def check_ranks_agree(self) -> None:
        """Refuse to go on where ranks stand at different steps. All ranks must call.

        Raises:
            ValueError: some ranks do not see the run directory that the others see.
        """
        step = torch.tensor(self.step, dtype=torch.float64)
        mean = self.engine.mean_over_ranks({"step": step})["step"]
        if self.engine.mean_over_ranks({"alike": step == mean})["alike"] != 1.0:  # on all: one rank may be the mean
            raise ValueError(
                f"all ranks must resume from one checkpoint, got step {self.step} on rank {self.ranks.rank} and "
                f"{mean:g} on average; put `runs_dir` on a file system that all machines share"
            )

    def run(self) -> None:
        """Train until the last epoch is done. All ranks must call.

        Raises:
            RunFailed: it cannot go on.
            RunInterrupted: it was asked to stop, and has saved a checkpoint.
        """
        config, is_main = self.config, self.ranks.rank == 0
        logger.info("%s", summary(config, self.ranks.world_size))
        resolved = resolved_dict(config)
        with (
            MetricsWriter(
                config.run_dir,
                enabled=is_main,
                resume_step=self.step,
                config=config.log,
                run_name=config.name,
                resolved=resolved,
            ) as self._writer,
            CheckpointWriter(
                config.run_dir, keep=config.train.keep, background=config.train.background_checkpoints
            ) as self._saver,
            self.console.start(num_epochs=config.train.epochs, total_steps=self.total_steps),
        ):
            if self._pending is not None:
                self._end_epoch_again(*self._pending)
            first_epoch, first_batch = self._start
            for epoch in range(first_epoch, config.train.epochs):
                self._run_epoch(epoch, first_batch if epoch == first_epoch else 0)
            self.interruption.conclude()
            self.watchdog.beat(self.step, "saving a checkpoint")
            self._saver.finish()
        logger.info("done: %d steps", self.step)

    def _run_epoch(self, epoch: int, start_batch: int) -> None:
        train = self.config.train
        if start_batch == 0:
            self.epoch_means.clear()
        self.watchdog.beat(self.step, "loading data")
        batches = self.loaders.of(epoch).epoch(epoch, start_batch)
        watch = Stopwatch()
        for done in range(start_batch + 1, self.steps_per_epoch + 1):
            batch, waited = self._next(batches)
            metrics, lr = self._train_step(batch)
            watch.record(self.config.data.global_batch_size, waited)
            ended = done == self.steps_per_epoch
            saving = ended or (train.checkpoint_every > 0 and self.step % train.checkpoint_every == 0)
            line: dict[str, float] = {}
            if saving or self.step % train.log_every == 0:  # no checkpoint without a look at the loss
                line = {"epoch": epoch, "lr": lr} | self._measure(metrics) | watch.read()
            if ended:
                line = self._evaluate(epoch, line)
            if line:
                self._write(epoch, line)
            signal = self.interruption.agreed()
            if saving or signal:
                self._save(epoch, scores=self._scores(line) if ended else None)
            if signal and self.step < self.total_steps:
                self._stop(signal)

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch, float]:
        """The next batch, and the seconds that it let this rank wait."""
        self.watchdog.beat(self.step, "loading data")
        asked = time.perf_counter()
        batch = next(batches)
        return batch, time.perf_counter() - asked

    def _train_step(self, batch: Batch) -> tuple[dict[str, Tensor], float]:
        lr = learning_rate(
            self.step,
            config=self.config.schedule,
            peak_lr=self.peak_lr,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.watchdog.beat(self.step + 1, "training step")
        loss, metrics = self.engine.train_step(batch.views, batch.labels, lr=lr, step=self.step + 1)
        self.step += 1
        self.method.after_step(self.step, self.engine.left_out)
        if self.average is not None:
            self.average.update(self.engine.left_out)
        return {"loss": loss} | metrics | self.observation.after_step(batch), lr

    def _measure(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """A line's figures, over all ranks; waits for the device."""
        self.watchdog.beat(self.step, "metrics")
        self.engine.check_finite()
        means = self.engine.mean_over_ranks(metrics)
        return means | self.observation.measure(self.engine.projections, step=self.step)

    def _evaluate(self, epoch: int, line: dict[str, float]) -> dict[str, float]:
        """The line of an epoch's last step, with what is measured after it.

        What is trained is saved before, since that can take long, or fail; a resume then begins with this.
        """
        if not self.observation.evaluates_after(epoch):
            return line
        self._save(epoch, pending=line)
        self.watchdog.beat(self.step, "evaluating")
        return line | self.observation.after_epoch(epoch, beat=lambda: self.watchdog.beat(self.step, "evaluating"))

    def _end_epoch_again(self, epoch: int, line: dict[str, float]) -> None:
        """Do what was to be done after the last step of an epoch when the run was cut off."""
        line = self._evaluate(epoch, line)
        self._write(epoch, line)
        self._save(epoch, scores=self._scores(line))

    def _write(self, epoch: int, line: dict[str, float]) -> None:
        self._writer.write(self.step, line)
        self.console.write(epoch, self.step, line)
        self.epoch_means.add(line)

    def _stop(self, signal: int) -> None:
        """End the run, once its state is on the disk."""
        self.interruption.conclude()
        self._saver.finish()
        self.engine.barrier()  # a launcher ends all ranks as soon as one has left
        raise stopped(signal, self.step)

    def _save(
        self, epoch: int, *, scores: dict[str, float] | None = None, pending: dict[str, float] | None = None
    ) -> None:
        """Write a checkpoint on rank 0; the state is the same on all ranks, which must all call.

        Args:
            epoch: that the last step was in.
            scores: at the end of an epoch; None: within one.
            pending: the line of an epoch's last step, where it is not complete yet.
        """
        self.watchdog.beat(self.step, "saving a checkpoint")
        self.engine.check_finite()
        optimizer_state = self.engine.optimizer_state()
        if self.ranks.rank != 0:
            return
        position: dict[str, Any] = {
            "step": self.step,
            "norm_batch_size": self.norm_batch_size,
            "epoch": epoch,
            "epoch_ended": scores is not None,
            "scores": scores or {},
            "pending": pending,
            "epoch_means": self.epoch_means.state_dict(),
        }
        self._saver.save(
            Checkpoint(
                model=self.method.state_dict(),
                optimizer=optimizer_state,
                average={} if self.average is None else self.average.state_dict(),
                probe=self.observation.state_dict(),
                position=position,
                config=resolved_dict(self.config),
                versions=self.versions,
                loader=self.loaders.state_dict(),
            )
        )

    def _scores(self, line: dict[str, float]) -> dict[str, float]:
        """What `train.keep_best` may compare at the end of an epoch."""
        scores = {name: self.epoch_means.mean(name) for name in EPOCH_MEANS} | {
            "knn_accuracy": line.get("knn_accuracy")
        }
        return {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
