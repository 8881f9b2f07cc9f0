"""One training step through DeepSpeed: the only module that knows it.

DeepSpeed owns the process group, the gradient all-reduce (an average over ranks) and mixed precision; its
configuration is generated here from ours, so that nothing is set in two places.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from model.methods.base import Method
from train.runtime import Ranks

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # torch's default; a first step may compile kernels for minutes


def init_process_group(device: torch.device) -> None:
    """Join the other ranks: NCCL between GPUs, gloo between CPU processes. All ranks must call."""
    deepspeed = _import_deepspeed(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=COLLECTIVE_TIMEOUT
    )


class Engine:
    """A method and its optimizer, wrapped for all ranks.

    Args:
        method: on the CPU or the device; moved and made channels_last here.
        optimizer: over its parameters.
        ranks: of this process.
        device: of this rank.
        precision: `bf16` autocasts.
        local_batch_size: images a rank and step.
    """

    def __init__(
        self,
        method: Method,
        optimizer: Optimizer,
        *,
        ranks: Ranks,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
        local_batch_size: int,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        config = deepspeed_config(precision, local_batch_size, ranks.world_size)
        self._world_size, self._device = ranks.world_size, device
        self.optimizer = optimizer
        self._engine = deepspeed.initialize(
            model=method, model_parameters=method.parameters(), optimizer=optimizer, config=config
        )[0]
        # Only now: DeepSpeed's broadcast of the initial weights needs them contiguous.
        method.to(memory_format=torch.channels_last)

    def train_step(self, views: list[Tensor], lr: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, backward, all-reduce, optimizer. All ranks must call.

        Returns:
            The loss of this rank's rows and its metrics, detached and still on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, metrics = self._engine(views)
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach(), metrics

    def mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Average scalars over the ranks, in one collective; waits for the device. All ranks must call."""
        values = torch.stack([value.detach().to(self._device, torch.float64) for value in metrics.values()])
        if self._world_size > 1:
            dist.all_reduce(values)
        return dict(zip(metrics, (values / self._world_size).tolist(), strict=True))


def deepspeed_config(precision: Literal["bf16", "fp32"], local_batch_size: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Its defaults clip gradients to norm 1 and print much; ours do neither."""
    return {
        "train_batch_size": local_batch_size * world_size,
        "train_micro_batch_size_per_gpu": local_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, quietly and without its build of shared-memory collectives."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a 35 s build for a gain that gloo does not need
    return deepspeed
