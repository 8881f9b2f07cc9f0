"""Pretrain an encoder: `deepspeed train/pretrain.py --config configs/….yaml --data.path ….beton --name …`.

Also under `torchrun`, and plainly under `python`. Everything that the user could have got wrong is checked before a
process group, a model or a folder exists.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started as a file: put the project's root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# Read once, when torch is loaded: its threads soon sleep where they wait for one another. Left to spin, they take the
# cores from the very thread that they wait for, as soon as anything else runs on the machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Else torch prints stacks of C++ whenever the rank that keeps the store leaves, even at the end of a run.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from train.cli import run
from train.config import parse_pretrain_config
from train.interruption import Interruption
from train.run import train


def main() -> None:
    """Parse, train."""
    with Interruption() as interruption:
        train(parse_pretrain_config(), interruption)


if __name__ == "__main__":
    run(main)
