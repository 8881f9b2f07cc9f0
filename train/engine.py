"""One training step through DeepSpeed: the only module that knows it.

DeepSpeed owns the process group, the gradient all-reduce (an average over ranks) and mixed precision; its
configuration is generated here from ours, so that nothing is set in two places.
"""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.methods.base import Method
from train.cli import UnfitEnvironment
from train.gradient_cache import Cotangents, cached_projections, loss_gradients, micro_batches, surrogate
from train.nonfinite import NonFiniteGuard
from train.optim.lars import LARS
from train.optim.param_groups import load_state_by_name, state_by_name
from train.optim.zero import FlatGroup, flat_groups, gather_state, partition_gradients, partition_lars, scatter_state
from train.runtime import Ranks
from train.stages import stage

COLLECTIVE_TIMEOUT_S = 1800.0  # torch's default; a first step may compile kernels for minutes
WATCHDOG_FIRST = 2.0  # a collective waits so many times longer than the watchdog, which can tell who is missing
BUCKET_ELEMENTS = 2**25  # of gradients reduced at a time: 128 MiB in float32, where DeepSpeed's default takes 2 GB


def init_process_group(device: torch.device, hang_timeout_s: float = 0.0) -> None:
    """Join the other ranks: NCCL between GPUs, gloo between CPU processes. All ranks must call.

    Args:
        device: of this rank.
        hang_timeout_s: after which the watchdog gives a rank up; 0: it never does.

    Raises:
        UnfitEnvironment: they cannot meet where the launcher says.
    """
    deepspeed = _import_deepspeed(device)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=collective_timeout(hang_timeout_s),
        )
    except dist.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UnfitEnvironment(
            f"the ranks cannot meet at {place}: {' '.join(str(error).split())}; where another run holds the port, "
            "give the launcher one of its own: `--master_port 29501`"
        ) from error


def collective_timeout(hang_timeout_s: float) -> timedelta:
    """How long ranks wait for one another, for every group: torch gives each new one its own default otherwise."""
    return timedelta(seconds=max(COLLECTIVE_TIMEOUT_S, WATCHDOG_FIRST * hang_timeout_s))


class Engine:
    """A method and its optimizer, wrapped for all ranks.

    Args:
        method: on the CPU or the device; moved here, and made channels_last under ZeRO stage 0.
        optimizer: over its parameters, in groups that carry `param_names`.
        ranks: of this process.
        device: of this rank.
        precision: `bf16` autocasts.
        local_batch_size: images a rank and step.
        micro_batch_size: images that go through the network at a time, a divisor of `local_batch_size`; default: all.
        zero_stage: 1 and 2 share the optimizer's state out among the ranks; LARS stays exact, other optimizers do if
            they treat every element by itself.
        gradient_clipping: largest norm of the whole gradient; 0: as it is.
        on_nonfinite: what a step with NaN or infinity does; see `train.nonfinite`.
    """

    def __init__(
        self,
        method: Method,
        optimizer: LARS,
        *,
        ranks: Ranks,
        device: torch.device,
        precision: Literal["bf16", "fp32"],
        local_batch_size: int,
        micro_batch_size: int | None = None,
        zero_stage: Literal[0, 1, 2] = 0,
        gradient_clipping: float = 0.0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        deepspeed = _import_deepspeed(device)
        self._micro_batch_size = micro_batch_size or local_batch_size
        config = deepspeed_config(
            precision,
            local_batch_size,
            ranks.world_size,
            micro_batch_size=self._micro_batch_size,
            zero_stage=zero_stage,
            gradient_clipping=gradient_clipping,
        )
        self._world_size, self._device = ranks.world_size, device
        self._autocast: dict[str, Any] = {
            "device_type": device.type,
            "dtype": torch.bfloat16,
            "enabled": precision == "bf16",
        }
        self._method, self.optimizer = method, optimizer
        # DeepSpeed's broadcast of the initial weights, and its flat partitions, need them contiguous.
        method.to(memory_format=torch.contiguous_format)
        self._engine, self._deepspeed_optimizer, *_ = deepspeed.initialize(
            model=_Network(method), model_parameters=method.parameters(), optimizer=optimizer, config=config
        )
        self._on_nonfinite = on_nonfinite
        self._guard = NonFiniteGuard(on_nonfinite, ranks, device)
        optimizer.skip = self._guard.skip
        self.projections: list[Tensor] = []
        """Of the last step: this rank's, [N, D] for each view, without a graph."""
        self._flat_groups: list[FlatGroup] = []
        if zero_stage == 0:
            method.to(memory_format=torch.channels_last)
            return
        self._flat_groups = flat_groups(self._deepspeed_optimizer)
        partition_lars(optimizer, self._flat_groups)

    def train_step(
        self, views: list[Tensor], labels: Tensor | None = None, *, lr: float, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, backward, all-reduce, optimizer. All ranks must call.

        Args:
            views: of this rank's images, [N, 3, H, W] each.
            labels: of the images, int64 [N], for methods that learn from them.
            lr: learning rate of this step.
            step: its number, from 1, for messages.

        Returns:
            The loss of this rank's rows and its metrics, detached and still on the device.

        Raises:
            RunFailed: see `NonFiniteGuard.check`; on a CPU before anything has moved, on a GPU not here but in
                `check_finite`, and nothing has moved either.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skips = self._on_nonfinite == "skip"
        buffers = [buffer.clone() for buffer in self._method.buffers()] if skips else []
        if len(views[0]) <= self._micro_batch_size:
            loss, metrics = self._step_at_once(views, labels, step)
        else:
            loss, metrics = self._step_in_micro_batches(views, labels, step)
        for buffer, before in zip(self._method.buffers(), buffers, strict=skips):
            buffer.copy_(torch.where(self._guard.skip, before, buffer))
        return loss.detach(), metrics

    @property
    def left_out(self) -> Tensor:
        """Whether the last step was left out for not being finite: a scalar on the device."""
        return self._guard.skip

    def check_finite(self) -> None:
        """Look at what the steps so far have met; waits for the device.

        Raises:
            RunFailed: see `NonFiniteGuard.check`; on all ranks alike.
        """
        self._guard.check()

    def _step_at_once(self, views: list[Tensor], labels: Tensor | None, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics, projections = self._engine(views, labels, None)
        self._observe(projections, loss)
        with stage("backward"):
            self._engine.backward(loss)
        with stage("optimizer"):
            self._guard_step(step)
            self._engine.step()
        return loss, metrics

    def _step_in_micro_batches(
        self, views: list[Tensor], labels: Tensor | None, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(**self._autocast):
            with stage("forward"):
                projections = cached_projections(self._method, views, self._micro_batch_size)
            with stage("loss"):
                cached = loss_gradients(self._method, projections, labels)
        self._observe(projections, cached.loss)
        by_piece = zip(*(torch.split(part, self._micro_batch_size) for part in cached.by_projection), strict=True)
        pieces = list(zip(micro_batches(views, self._micro_batch_size), by_piece, strict=True))
        for i, (piece, gradients) in enumerate(pieces):
            last = i == len(pieces) - 1
            given = Cotangents(list(gradients), cached.by_parameter if last else {})
            # The gradients are those of the whole batch already, not means over micro-batches. DeepSpeed's stage 0
            # divides the gradient of a forward's very output by their number all the same: so not the output itself.
            output = self._engine(piece, None, given).clone()
            with stage("backward"):
                self._engine.backward(output, scale_wrt_gas=False)
            with stage("optimizer"):
                if last:
                    self._guard_step(step)
                self._engine.step()  # the last one moves the parameters
        return cached.loss, cached.metrics

    def _observe(self, projections: list[Tensor], loss: Tensor) -> None:
        self.projections = projections[: self._method.num_views]  # keys, or a teacher's logits, follow them
        self._guard.observe(projections, loss)

    def _guard_step(self, step: int) -> None:
        """Between the last backward and the optimizer."""
        parameters = self._method.parameters()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self._flat_groups:
            gradients = partition_gradients(self._deepspeed_optimizer)
        self._guard.conclude(gradients, step)
        if self._device.type == "cpu":
            self._guard.check()

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state as `{parameter name: {slot: whole tensor}}`, alike on all ranks. All ranks must call.

        It does not depend on the ZeRO stage, nor on the number of ranks.
        """
        if self._flat_groups:
            return gather_state(self.optimizer, self._flat_groups)
        return state_by_name(self.optimizer)

    def load_optimizer_state(self, saved: dict[str, dict[str, Tensor]]) -> None:
        """Replace the optimizer's state by what `optimizer_state` gave, at any stage and number of ranks.

        Raises:
            ValueError: it is of another model; nothing is changed then.
        """
        if self._flat_groups:
            scatter_state(self.optimizer, self._flat_groups, saved)
        else:
            load_state_by_name(self.optimizer, saved)

    def load_parameters(self, saved: dict[str, Tensor]) -> None:
        """Replace the method's parameters and buffers by what its `state_dict()` gave."""
        self._method.load_state_dict(saved)
        if self._flat_groups:  # else the next step would bring the master copy's values back
            self._deepspeed_optimizer.refresh_fp32_params()

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self._world_size > 1:
            dist.barrier()

    def mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Average scalars over the ranks, in one collective; waits for the device. All ranks must call."""
        values = torch.stack([value.detach().to(self._device, torch.float64) for value in metrics.values()])
        if self._world_size > 1:
            dist.all_reduce(values)
        return dict(zip(metrics, (values / self._world_size).tolist(), strict=True))


class _Network(nn.Module):
    """What DeepSpeed wraps: a forward pass that ends in the scalar to go backward from."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: list[Tensor], labels: Tensor | None, given: Cotangents | None) -> Any:
        """The loss, its metrics and the projections; or, where their gradients are given, the surrogate."""
        with stage("forward"):
            projections = self.method.project(views)
        if given is not None:
            return surrogate(self.method, projections, given)
        with stage("loss"):
            loss, metrics = self.method.loss(projections, labels)
        return loss, metrics, [projection.detach() for projection in projections]


def deepspeed_config(
    precision: Literal["bf16", "fp32"],
    local_batch_size: int,
    world_size: int,
    *,
    micro_batch_size: int | None = None,
    zero_stage: Literal[0, 1, 2] = 0,
    gradient_clipping: float = 0.0,
) -> dict[str, Any]:
    """DeepSpeed's configuration. Its defaults clip gradients to norm 1 and print much; ours do neither."""
    micro_batch_size = micro_batch_size or local_batch_size
    return {
        "train_batch_size": local_batch_size * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": local_batch_size // micro_batch_size,
        "gradient_clipping": gradient_clipping,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice in every step
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage} if zero_stage == 0 else _partitions(zero_stage, gradient_clipping),
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            # Whose gradients would be averaged in bfloat16 under ZeRO: nobody's. What autocasts is torch's to know.
            "lower_precision_safe_modules": [],
        },
    }


def _partitions(zero_stage: Literal[1, 2], gradient_clipping: float) -> dict[str, Any]:
    return {
        "stage": zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": False,
        # The norm is there to clip by. Where it is not finite, DeepSpeed also leaves the step out, silently.
        "compute_grad_norm": gradient_clipping > 0.0,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, quietly and without its build of shared-memory collectives."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a 35 s build for a gain that gloo does not need
    deepspeed.utils.logger.addFilter(_is_news)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's word of caution at every optimizer that is not its own; ours is tested under ZeRO."""
    return "untested optimizer" not in record.getMessage()
