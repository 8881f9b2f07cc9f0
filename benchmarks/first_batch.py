"""The first batch of crops in a fresh process: `python -m benchmarks.first_batch CONTESTANT BETON BATCH_SIZE WORKERS`.

Prints the most memory that it has held, in MiB, when the batch is there. Started by `benchmarks.startup`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.contestant import status_mib
from benchmarks.two_views import Augment

CROP = Augment(size=224)


def main(name: str, path: str, batch_size: int, workers: int) -> None:
    """Each contestant imports only what it needs."""
    if name == "twinview":
        from benchmarks.twinview_loader import ffcv_loader, prepare_process
        from pipelines.beton import open_beton

        prepare_process()
        loader = ffcv_loader(open_beton(path), CROP, batch_size, workers)
        next(loader.epoch(0))
    else:
        from benchmarks.peers.stock_ffcv import stock_ffcv

        # It has compiled its kernels, by a first batch, when it returns; another one takes a few milliseconds.
        next(stock_ffcv(Path(path), CROP, batch_size, workers)(batch_size))
    print(status_mib("VmHWM"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
