"""The network of a checkpoint is loaded strictly: the weights that are asked for, and none too many or too few."""

import pytest
import torch

from model.build import build_method
from tests.train.evaluated import CONFIG, save_run
from train.checkpoint import checkpoint_path, load_checkpoint
from train.evaluation.representation import build_encoder, build_network


@pytest.fixture
def checkpoint(tmp_path):
    save_run(tmp_path, step=8, seed=8, average_seed=88)
    return load_checkpoint(checkpoint_path(tmp_path, 8))


def test_the_weights_are_those_that_are_asked_for(checkpoint, tmp_path):
    for weights, seed in (("live", 8), ("average", 88)):
        network = build_network("learned", checkpoint, weights=weights, source=tmp_path)
        expected = build_method(CONFIG.model, seed).state_dict()
        for name, tensor in network.encoder.state_dict().items():
            assert torch.equal(tensor, expected[f"encoder.{name}"]), name
        for k, layer in enumerate(network.head):
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, expected[f"projection_head.layers.{k}.{name}"]), name
        assert not network.encoder.training
        assert len(network.head) == 3


def test_an_encoder_is_loaded_alone_and_strictly(checkpoint):
    for name in [name for name in checkpoint.model if not name.startswith("encoder.")]:
        del checkpoint.model[name]
    build_encoder("learned", checkpoint)
    del checkpoint.model["encoder.layer2.0.bn1.running_var"]
    with pytest.raises(
        ValueError, match=r"lacks `layer2\.0\.bn1\.running_var` \[16\]; its configuration is of another encoder"
    ):
        build_encoder("learned", checkpoint)


def test_a_head_is_loaded_strictly(checkpoint):
    del checkpoint.model["projection_head.layers.1.0.weight"]
    with pytest.raises(
        ValueError, match=r"lacks `layers\.1\.0\.weight` \[24, 24\]; its configuration is of another proj"
    ):
        build_encoder("learned", checkpoint)


def test_random_is_the_network_that_the_run_started_from_with_open_branches(checkpoint, tmp_path):
    network = build_network("random", checkpoint, source=tmp_path)
    start = build_method(CONFIG.model, CONFIG.seed)
    for name, tensor in start.encoder.state_dict().items():
        expected = torch.ones_like(tensor) if tensor.ndim == 1 and name.endswith("weight") else tensor
        assert torch.equal(network.encoder.state_dict()[name], expected), name
    closed = [name for name, tensor in start.encoder.named_parameters() if tensor.ndim == 1 and (tensor == 0).all()]
    assert any(name.endswith("weight") for name in closed), "else opening does nothing"
