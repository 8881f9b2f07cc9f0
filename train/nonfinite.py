"""NaN and infinity in a step: seen before the optimizer moves, named by rank and step, without waiting for a GPU.

Each rank looks at its own projections, its loss, and the gradients that its optimizer will take; one small all-reduce
tells all ranks what each has seen. The answer stays on the device, where it also holds the optimizer back, so that
nothing has to wait for it. On the CPU it is read at once; on a GPU when the loop looks at its metrics, and before
every checkpoint.

Shapes: W ranks.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from train.cli import RunFailed
from train.runtime import Ranks

logger = logging.getLogger(__name__)

FINE, NAN, INFINITE, LOSS, GRADIENT = range(5)
FOUND = {
    NAN: "NaN in the projections",
    INFINITE: "an infinity in the projections",
    LOSS: "finite projections and a loss that is not",
}
MAX_SKIPPED_IN_A_ROW = 100  # a run that moves no more would only cost money


class NonFiniteGuard:
    """Watches the steps of one run.

    Args:
        policy: `raise` stops the run at the first such step; `skip` leaves that step out.
        ranks: of this process.
        device: of this rank.
    """

    def __init__(self, policy: Literal["raise", "skip"], ranks: Ranks, device: torch.device) -> None:
        self._policy, self._ranks = policy, ranks
        self._first_step = torch.full((ranks.world_size,), -1, dtype=torch.int64, device=device)
        self._found = torch.zeros(ranks.world_size, dtype=torch.int32, device=device)
        self._skipped = torch.zeros(2, dtype=torch.int64, device=device)  # in all, and in a row until now
        self._kind = torch.zeros((), dtype=torch.int64, device=device)  # what this rank has seen in this step
        self._reported = 0
        self.skip = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the optimizer must not move now: a scalar on the device."""

    @torch.no_grad()
    def observe(self, projections: list[Tensor], loss: Tensor) -> None:
        """Look at a step's forward pass."""
        has_nan = torch.stack([projection.isnan().any() for projection in projections]).any()
        has_infinity = torch.stack([projection.isinf().any() for projection in projections]).any()
        kind = torch.where(loss.isfinite(), FINE, LOSS)
        self._kind = torch.where(has_nan, NAN, torch.where(has_infinity, INFINITE, kind))

    @torch.no_grad()
    def conclude(self, gradients: list[Tensor], step: int) -> None:
        """Look at the gradients, and set `skip` for the optimizer. All ranks must call; nothing waits for a GPU.

        Args:
            gradients: what this rank's optimizer takes, reduced over the ranks.
            step: its number, from 1.
        """
        if gradients:
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(gradients, float("inf"))]).max()
            self._kind = torch.where((self._kind == FINE) & ~largest.isfinite(), GRADIENT, self._kind)
        seen = torch.zeros_like(self._found)
        seen[self._ranks.rank] = self._kind
        if self._ranks.world_size > 1:
            dist.all_reduce(seen)
        # Loss and gradient are global: one rank's NaN is every rank's. Those with sound projections are not to blame.
        to_blame = torch.where(((seen == NAN) | (seen == INFINITE)).any() & (seen >= LOSS), FINE, seen)
        is_first = (to_blame != FINE) & (self._first_step < 0)
        self._first_step.masked_fill_(is_first, step)
        self._found.copy_(torch.where(is_first, to_blame, self._found))
        bad = (seen != FINE).any()
        self._skipped.add_(bad).mul_(torch.stack((torch.ones_like(bad), bad)))
        self.skip.copy_(self.skip | bad if self._policy == "raise" else bad)

    def check(self) -> None:
        """Read what was seen; waits for the device.

        Raises:
            RunFailed: under `raise`, the first step that was not finite and the ranks to blame; under `skip`, when
                nothing but such steps came for long. The same on every rank.
        """
        first_step, found = self._first_step.tolist(), self._found.tolist()
        skipped, in_a_row = self._skipped.tolist()
        if not skipped:
            return
        step = min(step for step in first_step if step >= 0)
        blamed = _blame([kind if first == step else FINE for kind, first in zip(found, first_step, strict=True)])
        if self._policy == "raise":
            raise RunFailed(
                f"step {step} is not finite: {blamed}. The optimizer has not moved since; lower `optim.base_lr` or "
                "lengthen `schedule.warmup_epochs` and start again, or leave such steps out by "
                "`train.on_nonfinite: skip`",
                alike=True,
            )
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunFailed(
                f"the last {in_a_row} steps were not finite and left out; the first was step {step}: {blamed}. "
                "Lower `optim.base_lr` or lengthen `schedule.warmup_epochs`, and start again",
                alike=True,
            )
        if skipped > self._reported:
            logger.warning("steps left out so far: %d; the first was step %d: %s", skipped, step, blamed)
            self._reported = skipped


def _blame(found: list[int]) -> str:
    """What each rank found, in words; batch norm spreads what one rank meets to all of its group."""
    if GRADIENT in found:  # averaged over the ranks, and perhaps shared out among them: nobody's own
        return "losses are finite, the gradient is not"
    ranks = {kind: [rank for rank, of_rank in enumerate(found) if of_rank == kind] for kind in FOUND}
    if len(found) > 1 and len(set(found)) == 1:
        return f"every rank had {FOUND[found[0]]}"
    return "; ".join(
        f"rank{'s' * (len(those) > 1)} {', '.join(map(str, those))} had {FOUND[kind]}"
        for kind, those in ranks.items()
        if those
    )
