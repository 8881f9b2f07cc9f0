"""Ranks of a training run as one contestant: processes of their own, started as a launcher starts them, on gloo.

Each rank has the run's loader, engine and method, and takes as many steps as it is told; together they have as many
cores as there are of them. The contestant's process only tells them, and waits.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from benchmarks.contestant import Run

RECIPE = (
    "--augment.size=32",
    "--augment.blur_prob=0",
    "--model.encoder.depth=18",
    "--model.encoder.width=0.5",
    "--model.encoder.stem=imagenet",
    "--train.precision=fp32",
    "--train.device=cpu",
    "--train.cpu_threads=1",
    "--data.num_threads=1",
    "--schedule.warmup_epochs=1",
)
"""A ResNet-18 of half width on 32² views: some 0.3 s for 256 images on one core, and 12 MB of gradients."""


def cores() -> list[int]:
    """That this process may use."""
    return sorted(os.sched_getaffinity(0))


def training_ranks(world_size: int, arguments: Sequence[str]) -> Run:
    """Start the ranks; items are images, a multiple of the global batch.

    Args:
        world_size: number of ranks.
        arguments: of the run, as `train/pretrain.py` takes them.
    """
    from train.config import parse_pretrain_config
    from train.runtime import free_port

    batch = parse_pretrain_config(arguments).data.global_batch_size
    context, port = multiprocessing.get_context("forkserver"), free_port()
    pipes = []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        # Daemons end with the contestant; they have threads, and no processes of their own.
        context.Process(target=_rank, args=(theirs, rank, world_size, port, tuple(arguments)), daemon=True).start()
        theirs.close()
        pipes.append(ours)

    def run(items: int) -> None:
        for pipe in pipes:
            pipe.send(items // batch)
        for rank, pipe in enumerate(pipes):
            if told := pipe.recv():
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{told}")

    run(batch)
    return run


def _rank(pipe: Connection, rank: int, world_size: int, port: int, arguments: tuple[str, ...]) -> None:
    """A rank's process, until the pipe is closed: answers each number of steps with None, or with what went wrong."""
    try:
        _take_steps(pipe, rank, world_size, port, arguments)
    except EOFError:
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def _take_steps(pipe: Connection, rank: int, world_size: int, port: int, arguments: tuple[str, ...]) -> None:
    os.sched_setaffinity(0, cores()[:world_size])
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    from train.config import parse_pretrain_config
    from train.engine import init_process_group
    from train.run import build_engine, build_loaders, check, initial_method, set_up_machine
    from train.runtime import read_ranks

    config = parse_pretrain_config(arguments)
    checked = check(config, read_ranks())
    set_up_machine(checked)
    loaders, method = build_loaders(checked), initial_method(config)
    init_process_group(checked.device)
    engine = build_engine(config, method, checked.ranks, checked.device)
    batches = (batch for epoch in range(config.train.epochs) for batch in loaders.of(epoch).epoch(epoch))
    step = 0
    while True:
        for _ in range(pipe.recv()):
            step += 1
            batch = next(batches)
            engine.train_step(batch.views, batch.labels, lr=0.01, step=step)
            method.after_step(step, engine.left_out)
        pipe.send(None)
