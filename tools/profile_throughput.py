"""What limits a run's images per second, and what to change: `python -m tools.profile_throughput --config C`.

Measures on this machine, with the user's data, each stage alone and all together, names the stage that limits, advises,
and tries the advice. Every option of `train/pretrain.py` may follow. Ranks as in training:
`torchrun --nproc_per_node 2 -m tools.profile_throughput …`, or `deepspeed tools/profile_throughput.py …`.

Exit codes: 0 measured; 1 a step failed; 2 bad input. A file that is asked for appears when it is whole, or not at all.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started as a file: put the project's root, not this folder, on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# As train/pretrain.py has them, which measures are to be true of.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Else torch's profiler tells when it starts, and that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

from tools.profile_command import main
from train.cli import run

if __name__ == "__main__":
    run(main)
