"""Checkpoints in the background: training waits for a copy in host memory, not for the disk.

The copies of one checkpoint lie in a block of host memory that the next one uses again. A GPU's are queued in the
stream that trains: no later step can overtake them, and the host does not wait for them. A thread then computes the
checksum, writes the file and deletes what need not stay.

A checkpoint that cannot be written is not the end of a run: the previous one is whole, and the next may succeed.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from train.checkpoint import Checkpoint, checkpoint_path, named_tensors, section_texts, write_checkpoint
from train.checkpoint_file import as_integers
from train.checkpoint_keeping import KeepConfig, prune_checkpoints
from train.cli import RunFailed

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row
ALIGNMENT = 64  # bytes: of a cache line, and a multiple of every type's size


class CheckpointWriter:
    """Writes the checkpoints of a run; a context manager, whose end waits for the last of them.

    It keeps no reference to the tensors that it is given.

    Args:
        run_dir: of the run.
        keep: which checkpoints stay.
        background: write while training goes on; else `save` returns when the file is on the disk, and takes no
            memory for a copy.
    """

    def __init__(self, run_dir: Path, *, keep: KeepConfig, background: bool = True) -> None:
        self._run_dir, self._keep, self._background = run_dir, keep, background
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._num_failures = 0  # in a row
        self._reason = ""  # of the last one
        self._error: BaseException | None = None  # of the thread, where it is not the disk's

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under the name of its `position["step"]`; waits for the one before.

        Failures are logged as warnings.

        Raises:
            RunFailed: this was the third in a row that could not be written.
            ValueError: a tensor of a type that no file can hold.
        """
        self._wait()
        step: int = checkpoint.position["step"]
        tensors, texts = named_tensors(checkpoint), section_texts(checkpoint)
        waits = not self._background or self._num_failures == MAX_FAILURES - 1  # for the last try as well
        if self._background:
            copies, ready = self._memory.copy(tensors)
            # Not a daemon: the interpreter does not end in the middle of a write.
            self._thread = threading.Thread(
                target=self._write, args=(step, copies, texts, ready), name="checkpoint writer"
            )
            self._thread.start()
        else:
            self._write(step, tensors, texts, None)
        if waits:
            self._wait()

    def finish(self) -> None:
        """Wait until the newest checkpoint is on the disk.

        Raises:
            RunFailed: it could not be written.
        """
        self._wait()
        if self._num_failures:
            raise RunFailed(
                f"the newest state is not saved: {self._reason}; mend that, and start again to go on from it"
            )

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            if error is None:
                raise self._error
            logger.error("the last checkpoint was not written: %r", self._error)

    def _wait(self) -> None:
        """Until nothing is being written.

        Raises:
            RunFailed: there were too many failures in a row.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
        if self._num_failures >= MAX_FAILURES:
            raise RunFailed(
                f"{MAX_FAILURES} checkpoints in a row failed: {self._reason}; mend that, and start again to go on "
                "from it"
            )

    def _write(
        self, step: int, tensors: dict[str, Tensor], texts: dict[str, str], ready: torch.cuda.Event | None
    ) -> None:
        try:
            if ready is not None:
                ready.synchronize()
            write_checkpoint(checkpoint_path(self._run_dir, step), tensors, texts)
        except OSError as error:
            self._num_failures += 1
            self._reason = str(error)
            logger.warning(
                "%s; training goes on (failure %d, %d in a row end the run)", error, self._num_failures, MAX_FAILURES
            )
            return
        except BaseException as error:  # handed to the thread that trains
            self._error = error
            return
        self._num_failures = 0
        try:
            prune_checkpoints(self._run_dir, self._keep, newest=step)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)


class HostMemory:
    """A block of host memory that tensors are copied into, made once and used again; page-locked for a GPU's."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Copies of tensors, in place of those of the last call.

        Returns:
            The copies, with the strides of dense tensors, and what to wait for before they are read, if anything. What
            is queued on the current stream after this call does not change them.
        """
        begins, size = {}, 0
        for name, tensor in tensors.items():
            begins[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._block.numel() < size:
            self._block = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        copies = {}
        for name, tensor in tensors.items():
            strides = torch.empty_like(tensor, device="meta").stride()  # a copy is fastest in the order of memory
            piece = self._block[begins[name] : begins[name] + tensor.nbytes].view(tensor.dtype)
            copies[name] = piece.as_strided(tensor.shape, strides)
            if tensor.is_cuda:
                copies[name].copy_(tensor, non_blocking=True)
            else:
                np.copyto(as_integers(copies[name]), as_integers(tensor))
        if not on_gpu:
            return copies, None
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record()
        return copies, ready
