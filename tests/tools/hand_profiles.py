"""Profiles and surroundings put together by hand: the rates are given, and all else follows."""

from dataclasses import replace

from pipelines.build import DataConfig
from tools.profile_model import Surroundings
from tools.profile_results import STAGES, Profile, Stage
from train.config import PretrainConfig, resolved_dict

LOADING = ("storage_cold", "storage_warm", "decode", "crop", "photometric", "host_to_device")
GB = 10**9


def stage_of(name, images_per_sec, batch, place="host"):
    side = "loading" if name in LOADING else "training"
    seconds = batch / images_per_sec
    return Stage(
        name=name,
        images_per_sec=images_per_sec,
        side=side,
        seconds_per_batch=seconds,
        spread=0.1,
        how="by hand",
        place=place,
    )


def series(rates):
    """Images a second of stages that follow one another."""
    return 1 / sum(1 / rate for rate in rates)


def profile_of(
    rates, *, cores=4, num_threads=None, cpu_threads=None, gpu=(), device="cpu", held=1.0, config=None, **others
):
    """A profile with these rates by stage; loading and training are what its stages in a row make.

    Args:
        rates: images a second, by stage.
        cores: of a rank.
        num_threads: that decode; default: all cores.
        cpu_threads: that compute; likewise.
        gpu: stages of the loader that work on the device.
        device: cpu or cuda.
        held: share that the two reach together, of what sharing the cores without a gap would make.
        config: the run's.
        others: further fields.
    """
    config = config or PretrainConfig(name="hand", data=DataConfig(path="data/train.beton", global_batch_size=64))
    num_threads, cpu_threads = num_threads or cores, cpu_threads or cores
    batch = config.data.global_batch_size
    stages = {
        name: stage_of(
            name, rates[name], batch, "device" if name in gpu or (device == "cuda" and name not in LOADING) else "host"
        )
        for name in STAGES
        if name in rates
    }
    host = [
        s.images_per_sec
        for s in stages.values()
        if s.side == "loading" and s.place == "host" and s.name not in ("storage_cold", "host_to_device")
    ]
    on_device = [s.images_per_sec for s in stages.values() if s.side == "training" or s.name in gpu]
    loading = min([series(host), rates.get("host_to_device", 1e12)]) if host else 1e9
    training = series([s.images_per_sec for s in stages.values() if s.side == "training"])
    together = min(loading, series(on_device))
    if device == "cpu":
        together = min(together, cores / (num_threads / loading + cpu_threads / training))
    values = {
        "stages": stages,
        "loading_images_per_sec": loading,
        "training_images_per_sec": training,
        "together_images_per_sec": held * together,
        "data_wait": 0.0,
        "world_size": 1,
        "local_world_size": 1,
        "local_batch_size": batch,
        "global_batch_size": batch,
        "num_samples": 10_000,
        "device": device,
        "device_name": "NVIDIA H100" if device == "cuda" else "AMD EPYC",
        "num_cores": cores,
        "loader": config.data.loader,
        "num_threads": num_threads,
        "cpu_threads": cpu_threads,
        "precision": config.train.precision,
        "encoder": {"depth": config.model.encoder.depth, "width": config.model.encoder.width, "sk": False},
        "image_side": config.augment.size,
        "num_views": 2,
        "bytes_per_image_stored": 54_000.0,
        "bytes_per_image_to_device": 2 * 3 * config.augment.size**2 + 8.0,
        "parameters": 23_000_000,
        "gradient_bytes": 92_000_000,
        "memory": {"peak_bytes": 8.0 * GB, "activation_bytes_per_image": 2e7, "state_bytes": 3e8},
        "flops_per_image": 2.4e10,
        "config": resolved_dict(config),
        "environment": {},
        "command": "by hand",
    }
    return Profile(**(values | others))


PHOTOS = Surroundings(
    set_bytes=540_000_000,
    stored="jpeg",
    mean_pixels=500 * 375.0,
    longest_side=500,
    free_memory=16 * GB,
    device_memory=24 * GB,
    device_free=16 * GB,
    fast_bf16=True,
    has_dali=True,
)


def around(**others):
    """Ten thousand photographs of 500 pixels, which memory holds."""
    return replace(PHOTOS, **others)
