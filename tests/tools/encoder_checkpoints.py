"""Checkpoints of encoders that look trained: no running statistic and no scale is what it was at the start."""

import torch

from model.build import ModelConfig, build_method
from model.resnet import EncoderConfig
from pipelines.augment import AugmentConfig
from pipelines.build import DataConfig
from train.checkpoint import Checkpoint, save_checkpoint
from train.config import PretrainConfig, resolved_dict

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def look_trained(module, seed=1):
    """Give every batch norm statistics, scale and offset of its own, such that activations stay of one size."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.bias is not None:
            with torch.no_grad():
                layer.running_mean.normal_(0, 0.1, generator=generator)
                layer.running_var.uniform_(0.5, 2.0, generator=generator)
                layer.weight.uniform_(0.3, 1.0, generator=generator)
                layer.bias.normal_(0, 0.1, generator=generator)
                layer.num_batches_tracked.fill_(7)
    return module


def write_checkpoint(path, *, side=40, average=False, **encoder):
    """Save a method with the encoder of these options as a run would; returns the encoder, in evaluation mode."""
    config = PretrainConfig(
        name="run",
        data=DataConfig(path="set.beton"),
        augment=AugmentConfig(size=side, mean=MEAN, std=STD),
        model=ModelConfig(encoder=EncoderConfig(**encoder)),
    )
    method = look_trained(build_method(config.model, seed=3)).eval()
    checkpoint = {"model": method.state_dict(), "config": resolved_dict(config), "position": {"step": 12}}
    if average:
        checkpoint["average"] = look_trained(build_method(config.model, seed=4), seed=5).state_dict()
    save_checkpoint(path, Checkpoint(**checkpoint))
    return method.encoder
