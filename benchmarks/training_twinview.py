"""Our contestant of the training contest: `train.run.train`, the whole of it, held between turns.

The run is the one that `train/pretrain.py` starts: loader, method, DeepSpeed engine, LARS, metrics, TensorBoard and a
checkpoint at the end of each epoch. It goes on in a thread of its own, and waits where the loop asks whether it has
been told to stop, which it does after every step. Turns are whole epochs, so that no batch is made between them; the
checkpoint of a turn's last epoch is written at the beginning of the next turn.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from benchmarks.contestant import Run
from train.config import PretrainConfig
from train.interruption import Interruption
from train.run import train
from train.runtime import Ranks

PATIENCE_S = 600.0  # for the start of the run: a first one compiles kernels


class Pace(Interruption):
    """Lets a run do as many steps as it is told to; takes no signals."""

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self._total_steps, self._done, self._allowed = total_steps, 0, 0
        self._changed = threading.Condition()
        self._ready = False
        self._ended: BaseException | bool = False  # the error, or that there was none

    def begin(self, ranks: Ranks, timeout: timedelta | None = None) -> None:
        """Everything is set up: wait for the first turn."""
        with self._changed:
            self._ready = True
            self._wait_for_turn()

    def agreed(self) -> int:
        """A step is done: wait for the next turn where it was the last one of this."""
        with self._changed:
            self._done += 1
            if self._done < self._total_steps:
                self._wait_for_turn()
        return 0

    def conclude(self) -> None:
        """There is nobody to agree with."""

    def start(self, config: PretrainConfig) -> None:
        """Start the run; return when it is set up."""
        threading.Thread(target=self._run, args=(config,), daemon=True).start()
        self._wait_until(lambda: self._ready, PATIENCE_S)

    def go(self, num_steps: int) -> None:
        """Let it do so many steps; with the last one of all it ends.

        Raises:
            ValueError: it has no more steps.
        """
        with self._changed:
            if self._allowed + num_steps > self._total_steps:
                raise ValueError(f"the run is over after {self._total_steps} steps, got {num_steps} more to do")
            self._allowed += num_steps
            self._changed.notify_all()
        whole = self._allowed >= self._total_steps
        self._wait_until(lambda: not whole and self._done == self._allowed, None)

    def _wait_for_turn(self) -> None:
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._allowed > self._done)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float | None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or condition(), timeout_s):
                raise RuntimeError(f"the run was not set up within {timeout_s:.0f} s")
        if isinstance(self._ended, BaseException):
            raise self._ended

    def _run(self, config: PretrainConfig) -> None:
        ended: BaseException | bool = True
        # What a person would see of the run, in place of lines between those of the benchmark.
        console = Path(config.runs_dir, f"{config.name}.console")
        console.parent.mkdir(parents=True, exist_ok=True)
        try:
            with console.open("w") as stream, redirect_stderr(stream):
                train(config, self)
        except BaseException as error:  # whatever it is, the turn that waits is to raise it
            ended = error
        with self._changed:
            self._ended = ended
            self._changed.notify_all()


def twinview_training(config: PretrainConfig, num_images: int, cores: int) -> Run:
    """Set the run up.

    Args:
        config: of the run.
        num_images: of its set.
        cores: that it may use, for training and loading together.

    Returns:
        Trains on so many images, a multiple of `images_of_epoch`.
    """
    take_cores(cores)
    batch_size = config.data.global_batch_size
    pace = Pace(config.train.epochs * (num_images // batch_size))
    # Between its turns it stands still, for as long as the others take.
    pace.start(replace(config, train=replace(config.train, hang_timeout_s=0.0)))
    return lambda images: pace.go(images // batch_size)


def take_cores(cores: int) -> None:
    """Keep this process, and those that it starts, on the first `cores` of the machine's."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def images_of_epoch(num_images: int, batch_size: int) -> int:
    """Images that an epoch trains on: whole batches."""
    return num_images // batch_size * batch_size
