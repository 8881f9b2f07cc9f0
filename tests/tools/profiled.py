"""Profiles that tests measure: on ranks from the fork server, each of which leaves its profile as JSON."""

import json
from pathlib import Path

from tests.reliability.forked import Forked, variables_of
from tests.train.runs import TINY
from train.runtime import free_port

BATCH = ["--data.global_batch_size=16", "--data.num_threads=1", "--name=run"]


def profiles_of(folder, *variants, world_size=1, seconds=0.1):
    """The profiles of some configurations, measured one after the other by the same ranks: `[variant][rank]`.

    Args:
        folder: for what the ranks leave, and the `runs_dir` that they must not touch.
        variants: options of each configuration, beside `TINY`.
        world_size: number of ranks.
        seconds: of each measurement.
    """
    arguments = [[*TINY, *BATCH, f"--runs_dir={folder / 'runs'}", *options] for options in variants]
    port, told = free_port(), (str(folder), arguments, seconds)
    ranks = [
        Forked(Path(folder, f"output-{rank}"), variables_of(rank, world_size, port), measure, *told)
        for rank in range(world_size)
    ]
    try:
        assert [rank.end() for rank in ranks] == [0] * world_size, "\n".join(rank.text()[-3000:] for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads(Path(folder, f"profiles-{rank}.json").read_text()) for rank in range(world_size)]
    return list(zip(*found, strict=True))


def steps_of(folder, *variants):
    """For each of some configurations: CPU seconds of whole steps, and of the parts of as many; from one rank."""
    arguments = [[*TINY, *BATCH, f"--runs_dir={folder / 'runs'}", *options] for options in variants]
    rank = Forked(Path(folder, "output"), variables_of(0, 1, free_port()), take_steps, str(folder), arguments)
    try:
        assert rank.end() == 0, rank.text()[-3000:]
    finally:
        rank.kill()
    return json.loads(Path(folder, "steps.json").read_text())


def take_steps(folder, variants):
    """What that rank runs."""
    import time

    import torch

    from tools.profile_loader import run_batches
    from tools.profile_stages import without_traces
    from tools.profile_step import Stepper
    from train.config import parse_pretrain_config
    from train.engine import init_process_group
    from train.run import build_engine, build_loaders, check, initial_method, set_up_machine
    from train.runtime import read_ranks

    found = []
    for options in variants:
        config = without_traces(parse_pretrain_config(options))
        checked = check(config, read_ranks())
        set_up_machine(checked)
        loaders, method = build_loaders(checked), initial_method(config)
        init_process_group(checked.device)
        engine = build_engine(config, method, checked.ranks, checked.device)
        stepper = Stepper(engine, method, torch.device("cpu"), clock=time.process_time)
        batches = run_batches(loaders.of(0))
        kept = [next(batches), next(batches)]
        batches.close()
        loaders.close()
        stepper.number_of_steps(kept[0], 0.01)
        found.append(stepper.measure(kept, 6))
    Path(folder, "steps.json").write_text(json.dumps(found))


def measure(folder, variants, seconds):
    """What each rank runs."""
    import os

    from tools.profile_stages import ProfileSettings, measure_profile
    from train.config import parse_pretrain_config

    settings = ProfileSettings(seconds=seconds, command="a test")
    profiles = [measure_profile(parse_pretrain_config(options), settings).to_json() for options in variants]
    Path(folder, f"profiles-{os.environ['RANK']}.json").write_text(json.dumps(profiles, allow_nan=False))
