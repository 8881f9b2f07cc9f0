"""What ranks tell one another before the first step, among real gloo ranks, and in what words they refuse."""

import dataclasses
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipelines.build import DataConfig
from tests.distributed.ranks import run_ranks
from train import preflight as module
from train.cli import RunFailed
from train.config import PretrainConfig, TrainConfig, flatten, resolved_dict
from train.engine import Engine
from train.loop import Pretraining
from train.optim.lars import LARSConfig
from train.preflight import compare, gather_json, preflight, source_hash, warn_of_other_gpus
from train.runtime import Ranks

CONFIG = PretrainConfig(name="run", data=DataConfig(path="/data/set.beton"))
IDENTITY = {"dataset": "0a1b2c3d", "num_samples": 320, "seed": 0, "global_batch_size": 256}


def ranks_of(rank):
    return Ranks(rank=rank, world_size=dist.get_world_size(), local_rank=rank, local_world_size=dist.get_world_size())


def refusal(rank, *, config=CONFIG, identity=IDENTITY):
    """What preflight says to this rank: None where all is well."""
    try:
        preflight(ranks_of(rank), config=config, data_identity=identity)
    except RunFailed as error:
        return f"{error}" if error.alike else "not alike"
    return None


def on(rank, which, value, other):
    return value if rank == which else other


def check_alike(rank):
    elsewhere = dataclasses.replace(
        CONFIG,
        runs_dir=f"/mnt/{rank}/runs",
        data=dataclasses.replace(
            CONFIG.data, path=f"/local/{rank}/set.beton", num_threads=rank, batches_ahead=1 + rank
        ),
        train=dataclasses.replace(CONFIG.train, cpu_threads=rank),
    )
    return refusal(rank, config=elsewhere)


def check_config(rank):
    return refusal(rank, config=dataclasses.replace(CONFIG, optim=LARSConfig(base_lr=on(rank, 2, 0.2, 0.3))))


def check_what_changes_collectives(rank):
    """Batches, micro-batches, ZeRO and steps between logs, all at once: nothing may hang."""
    train = TrainConfig(micro_batch_size=16, zero_stage=2, log_every=3, checkpoint_every=5)
    data = dataclasses.replace(CONFIG.data, global_batch_size=512)
    config = dataclasses.replace(CONFIG, train=train, data=data, name="a name so long that its text has another length")
    return refusal(rank, config=on(rank, 0, CONFIG, config))


def check_data(rank):
    identity = IDENTITY | {"dataset": on(rank, 1, "ffffffff", "0a1b2c3d"), "seed": on(rank, 1, 7, 0)}
    return refusal(rank, config=dataclasses.replace(CONFIG, seed=identity["seed"]), identity=identity)


def check_packages(rank, monkeypatch):
    versions = {"python": "3.11.2", "torch": on(rank, 1, "2.11.0", "2.15.0")} | on(rank, 2, {}, {"numba": "0.68"})
    monkeypatch.setattr(module, "package_versions", lambda: versions)
    return refusal(rank)


def check_source(rank, monkeypatch):
    """Another checkout knows other options too: the checkout is named first."""
    monkeypatch.setattr(module, "source_hash", lambda: on(rank, 2, "0123456789ab", "ba9876543210"))
    return refusal(rank, config=dataclasses.replace(CONFIG, seed=on(rank, 2, 1, 0)))


def check_clock(rank, monkeypatch):
    """A rank whose clock is shifted; one that is off by less than the tolerance is none."""
    now = time.time
    monkeypatch.setattr(module.time, "time", lambda: now() + (0.0, 2.0, -90.0)[rank])
    return refusal(rank)


def check_hosts(rank, monkeypatch):
    monkeypatch.setattr(module.socket, "gethostname", lambda: on(rank, 0, "node-a", "node-b"))
    return refusal(rank, config=dataclasses.replace(CONFIG, seed=min(rank, 1)))


def check_all(rank):
    said = {}
    for check in (check_alike, check_config, check_what_changes_collectives, check_data):
        said[check.__name__] = check(rank)
    for check in (check_packages, check_source, check_clock, check_hosts):
        with pytest.MonkeyPatch.context() as monkeypatch:
            said[check.__name__] = check(rank, monkeypatch)
    said["gathered"] = gather_json({"é": [rank] * rank})
    return said


@pytest.mark.distributed
def test_three_ranks_say_which_of_them_differs_and_in_what():
    everyones = run_ranks(check_all, 3)
    for said in everyones[1:]:
        assert said == everyones[0]  # the same words everywhere
    said = everyones[0]
    assert said["gathered"] == [{"é": []}, {"é": [1]}, {"é": [2, 2]}]
    assert said["check_alike"] is None
    host = module.socket.gethostname()
    rank_2 = f"rank 2 ({host}) differs from rank 0 ({host}): "
    assert said["check_config"] == f"{rank_2}`optim.base_lr` is 0.2, not 0.3; start all ranks with one configuration"
    assert said["check_what_changes_collectives"] == (
        f"ranks 1–2 ({host}) differ from rank 0 ({host}): `data.global_batch_size` is 512, not 256, "
        "`name` is a name so long that its text has another length, not run, `train.checkpoint_every` is 5, not 0; "
        "and 3 more; start all ranks with one configuration"
    )
    assert said["check_data"] == (
        f"rank 1 ({host}) differs from rank 0 ({host}): `seed` is 7, not 0, the data's `dataset` is ffffffff, not "
        "0a1b2c3d; start all ranks with one configuration"
    )
    assert said["check_packages"] == (
        f"rank 1 ({host}) differs from rank 0 ({host}): package torch is 2.11.0, not 2.15.0; "
        f"{rank_2}package numba is missing, not 0.68; install the same packages on all machines"
    )
    assert said["check_source"] == (
        f"{rank_2}Twinview's source is 0123456789ab, not ba9876543210, `seed` is 1, not 0; "
        "bring all machines to one checkout of Twinview"
    )
    assert said["check_clock"] == f"{rank_2}the clock is 90 s behind; set the machines' clocks by NTP"
    assert said["check_hosts"] == (
        "ranks 1–2 (node-b) differ from rank 0 (node-a): `seed` is 1, not 0; start all ranks with one configuration"
    )


def told(**changes):
    """What one rank of many says."""
    device = {"kind": "GPU", "machine": "x86_64"}
    base = {
        "host": "a",
        "source": "s",
        "packages": {},
        "device": device,
        "device_name": "H100",
        "config": {},
        "data": {},
    }
    return base | {"clock": 0.0} | changes


def test_other_devices_are_refused_and_gpus_of_another_name_are_only_told(caplog):
    with pytest.raises(RunFailed, match=r"rank 1 \(b\) differs from rank 0 \(a\): device kind is CPU, not GPU; start"):
        compare([told(), told(host="b", device={"kind": "CPU", "machine": "x86_64"}, device_name="H100")])
    statements = [told(), told(), told(host="b", device_name="A100")]
    compare(statements)
    warn_of_other_gpus(statements)
    assert caplog.messages[-1] == (
        "the ranks run on different GPUs, and the slowest sets the pace: ranks 0–1 (a): H100; rank 2 (b): A100"
    )


def test_ranks_are_told_by_stretches_and_each_machine_once():
    statements = [told(seed=0)] + [
        told(host=f"n{rank // 4}", config={"seed": rank in {1, 4, 5, 6}}) for rank in range(1, 9)
    ]
    statements[0]["config"] = {"seed": False}
    with pytest.raises(
        RunFailed, match=r"^ranks 1, 4–6 \(n0, n1\) differ from rank 0 \(a\): `seed` is True, not False; "
    ):
        compare(statements)


def test_a_run_of_one_rank_needs_no_process_group():
    preflight(Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1), config=CONFIG, data_identity=IDENTITY)


def test_what_may_differ_between_machines_are_fields_that_exist():
    fields = flatten(resolved_dict(CONFIG)).keys()
    assert fields >= module.PER_MACHINE
    assert {"seed", "optim.base_lr", "model.encoder.depth"} <= fields - module.PER_MACHINE


def test_the_hash_of_the_source_is_that_of_its_contents_and_names(tmp_path, monkeypatch):
    def hashed(files, name):
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.setattr(module, "__file__", str(tmp_path / name / "train" / "preflight.py"))
        return source_hash()

    files = {"train/loop.py": "a = 1\n", "model/ntxent/loss.py": "b = 2\n"}
    first = hashed(files, "one")
    assert hashed(files | {"train/notes.txt": "", "tests/test_x.py": ""}, "elsewhere") == first
    assert hashed(files | {"train/loop.py": "a = 2\n"}, "changed") != first
    assert hashed({"train/loop2.py": "a = 1\n", "model/ntxent/loss.py": "b = 2\n"}, "renamed") != first


def stand_at(rank, steps):
    """What a rank says that stands at `steps[rank]`, by the loop's own check."""
    engine = SimpleNamespace(_device=torch.device("cpu"), _world_size=len(steps))
    engine.mean_over_ranks = partial(Engine.mean_over_ranks, engine)
    place = SimpleNamespace(engine=engine, step=steps[rank], ranks=SimpleNamespace(rank=rank))
    try:
        Pretraining.check_ranks_agree(place)
    except ValueError as error:
        return str(error).partition(";")[0]
    return ""


@pytest.mark.distributed
def test_ranks_that_stand_at_different_steps_all_stop():
    """The one that stands at their mean as well; and steps that float32 cannot count."""
    said = run_ranks(stand_at, 3, (10, 20, 15))
    assert said == [
        f"all ranks must resume from one checkpoint, got step {step} on rank {rank} and 15 on average"
        for rank, step in enumerate((10, 20, 15))
    ]
    assert run_ranks(stand_at, 2, (2**24 + 1, 2**24 + 1)) == ["", ""]
