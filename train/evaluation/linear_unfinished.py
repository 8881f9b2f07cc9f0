"""What a streamed linear evaluation needs to go on after it was cut off: its heads after the last whole epoch.

A file in the checkpoint's format, in a folder of `evaluation/unfinished/` in the run directory. That folder is named by
a digest of all that the heads depend on: an evaluation of something else finds a file of its own, or none. Every view
follows from seed and epoch, so a training that goes on equals the one that was not cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict

import torch

from model.collectives import all_gather_rows
from train.checkpoint import Checkpoint, DamagedCheckpoint, load_checkpoint, save_checkpoint
from train.evaluation.features import FeatureSource
from train.evaluation.linear_config import LinearConfig
from train.evaluation.linear_passes import identity_of_views
from train.evaluation.linear_probe import Head, LinearHeads
from train.evaluation.representation import LayeredNetwork
from train.initial_encoder import results_dir

logger = logging.getLogger(__name__)


class Unfinished:
    """The file of one training, in a folder that goes when the result is written.

    Args:
        source: of the checkpoint and the set.
        config: of the evaluation.
        network: that representations come from.
        heads: that are trained.
        seed: of the training.
        batch_size: over all ranks.
    """

    def __init__(
        self,
        source: FeatureSource,
        config: LinearConfig,
        network: LayeredNetwork,
        heads: Sequence[Head],
        seed: int,
        batch_size: int,
    ) -> None:
        self._identity = identity_of_views(source, config, network) | {
            "heads": [asdict(head) for head in heads],
            "held_out": [config.val_fraction, config.seed],
            "seed": seed,
            "epochs": config.epochs,
            "global_batch_size": batch_size,
            "momentum": config.momentum,
            "init_std": config.init_std,
        }
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:32]
        # In a folder of its own, since writing a checkpoint clears away what killed processes left of others.
        self.folder = results_dir(source.path) / "evaluation" / "unfinished" / f"linear-{digest}"
        self.path = self.folder / "heads.safetensors"

    def load(self, heads: LinearHeads) -> tuple[int, list[float]]:
        """Let heads go on from the file, if there is a whole one. All ranks must call.

        Returns:
            Epochs that are done, and the losses of the last one.

        Raises:
            ValueError: the ranks do not see the same file.
        """
        found = self._read()
        epochs = 0 if found is None else int(found.position["epochs"])
        of_ranks = all_gather_rows(torch.tensor([epochs], device=heads.bias.device)).tolist()
        if len(set(of_ranks)) > 1:
            raise ValueError(
                f"all ranks must go on from one file, got epochs {of_ranks} in rank order from {self.path}; put the "
                "run directory on a file system that all machines share"
            )
        if found is None:
            return 0, []
        heads.load_state_dict(found.model)
        logger.info("going on from %s: %d epochs are done", self.path, epochs)
        return epochs, list(found.position["losses"])

    def save(self, heads: LinearHeads, epochs: int, losses: Sequence[float]) -> None:
        """Replace the file. On one rank.

        Raises:
            OSError: it could not be written.
        """
        save_checkpoint(
            self.path,
            Checkpoint(
                model={name: value.cpu() for name, value in heads.state_dict().items()},
                position={"epochs": epochs, "losses": list(losses)},
                config=self._identity,
            ),
        )

    def _read(self) -> Checkpoint | None:
        if not self.path.exists():
            return None
        try:
            found = load_checkpoint(self.path)
        except DamagedCheckpoint as error:
            logger.warning("%s; the evaluation starts anew", error)
            return None
        if found.config != self._identity:
            raise ValueError(f"{self.path} must be of this evaluation, and is of another one: remove it")
        return found
