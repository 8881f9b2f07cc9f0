"""Profiles made by hand, whose seconds are round: what a plan makes of them can be worked out on paper."""

import json
from dataclasses import replace

from model.build import ModelConfig
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from tools.profile_results import Profile, Stage
from train.config import PretrainConfig, TrainConfig, resolved_dict

LOADING = ("storage_cold", "storage_warm", "decode", "crop", "photometric", "host_to_device")


def stage(name, seconds, batch):
    return Stage(
        name=name,
        images_per_sec=batch / seconds,
        side="loading" if name in LOADING else "training",
        seconds_per_batch=seconds,
        spread=0.0,
        how="by hand",
    )


def run_config(*, size=32, batch=64, epochs=10, precision="fp32", depth=10, width=0.25, stem="cifar", **train):
    return PretrainConfig(
        name="hand",
        data=DataConfig(path="set.beton", global_batch_size=batch),
        augment=AugmentConfig(size=size),
        model=ModelConfig(encoder=EncoderConfig(depth=depth, width=width, stem=stem)),
        train=TrainConfig(epochs=epochs, precision=precision, **train),
    )


def profile(
    *,
    run=None,
    ranks=1,
    device="cpu",
    loading=1000.0,
    training=800.0,
    together=640.0,
    seconds=None,
    memory=None,
    parameters=1000,
    **fields,
):
    """`seconds`: of stages, by name; by default forward and backward take 25 ms and 50, loss and optimizer 2 and 3."""
    run = run or run_config()
    batch = run.data.global_batch_size
    seconds = seconds or {"decode": 0.030, "crop": 0.010, "forward": 0.025, "loss": 0.002, "backward": 0.050} | {
        "optimizer": 0.003
    }
    values = {
        "stages": {name: stage(name, value, batch) for name, value in seconds.items()},
        "loading_images_per_sec": loading,
        "training_images_per_sec": training,
        "together_images_per_sec": together,
        "data_wait": 0.1,
        "world_size": ranks,
        "local_world_size": ranks,
        "local_batch_size": batch // ranks,
        "global_batch_size": batch,
        "num_samples": 64_000,
        "device": device,
        "device_name": "by hand",
        "num_cores": 4,
        "loader": "ffcv",
        "num_threads": 4,
        "cpu_threads": 4,
        "precision": run.train.precision,
        "encoder": {
            "depth": run.model.encoder.depth,
            "width": run.model.encoder.width,
            "sk": run.model.encoder.selective_kernel,
        },
        "image_side": run.augment.size,
        "num_views": 2,
        "bytes_per_image_stored": 50_000.0,
        "bytes_per_image_to_device": 1.0,
        "parameters": parameters,
        "gradient_bytes": 4 * parameters,
        "memory": memory or {},
        "flops_per_image": None,
        "config": resolved_dict(run),
        "environment": {},
        "command": "by hand",
    }
    return Profile(**values | fields)


def gpu_profile(**fields):
    """A ResNet-50 at 224² on a GPU, 256 images a step in 0.2 s, of which loading takes 0.16 s."""
    run = run_config(size=224, batch=256, precision="bf16", depth=50, width=1.0, stem="imagenet", epochs=100)
    parts = {"decode": 0.10, "crop": 0.05, "host_to_device": 0.01}
    parts |= {"forward": 0.060, "loss": 0.001, "backward": 0.135, "optimizer": 0.004}
    return profile(
        **{
            "run": run,
            "device": "cuda",
            "loading": 1600.0,
            "training": 1280.0,
            "together": 1250.0,
            "seconds": parts,
            "num_samples": 1_281_167,
            "num_cores": 16,
            "num_threads": 16,
            "memory": {"peak_bytes": 28e9, "activation_bytes_per_image": 95e6, "state_bytes": 336e6},
        }
        | fields
    )


def written(path, *profiles):
    """Their files."""
    paths = [path / f"profile{i}.json" for i in range(len(profiles))]
    for file, each in zip(paths, profiles, strict=True):
        file.write_text(json.dumps(each.to_json()))
    return [str(file) for file in paths]


def changed(one, **fields):
    return replace(one, **fields)
