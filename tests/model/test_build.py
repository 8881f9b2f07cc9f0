"""Building a method from a configuration and a seed."""

import pytest
import torch

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig

SMALL = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(num_layers=3, hidden_dim=6, out_dim=4),
    temperature=0.2,
)


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_method(SMALL, seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = build_method(SMALL, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    other = build_method(SMALL, seed=8).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
    assert not torch.equal(first["projection_head.layers.0.0.weight"], other["projection_head.layers.0.0.weight"])


def test_the_configuration_arrives():
    method = build_method(SMALL, seed=0)
    assert method.encoder.feature_dim == 64
    assert method.contrastive_loss.temperature() == 0.2
    assert method.num_views == 2
    assert [layer[0].out_features for layer in method.projection_head.layers] == [6, 6, 4]


def test_defaults_are_simclrs_on_the_meta_device():
    with torch.device("meta"):
        method = build_method(ModelConfig(), seed=0)
    assert all(p.is_meta for p in method.parameters())
    assert sum(p.numel() for p in method.encoder.parameters()) == 23_508_032  # ResNet-50 less its `fc`
    assert method.projection_head.layers[-1][0].out_features == 128
    assert method.contrastive_loss.temperature() == 0.1


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_bad_temperature_is_named(temperature):
    with pytest.raises(ValueError, match=r"`model.temperature` must be a finite number > 0, got"):
        ModelConfig(temperature=temperature)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"`model.method` must be one of simclr, supervised, distill, got 'magic'"):
        ModelConfig(method="magic")
