"""Counts of memory and operations, against counts by hand."""

import pytest
import torch
from torch import nn

from model.activation_checkpointing import checkpoint_activations
from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from tools.profile_memory import LiveBytes, activation_bytes_per_image, flops_per_image, state_bytes
from train.optim.lars import LARS
from train.optim.param_groups import param_groups

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": False}
VIEWS = 2


def make_method(width=0.125, depth=10):
    encoder = EncoderConfig(depth=depth, width=width, stem="cifar")
    return build_method(ModelConfig(encoder=encoder, projection_head=ProjectionHeadConfig(out_dim=16)), seed=0)


def views_of(num, side=16):
    return [torch.randn(num, 3, side, side) for _ in range(VIEWS)]


def flops_by_hand(method, side):
    """Two for each multiply-add: forward, and backward for the weights and (but at the images) for the input."""
    counted = []

    def count(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            once = 2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            counted.append(once * (3 if inputs[0].requires_grad else 2))
        elif isinstance(module, nn.Linear):
            counted.append(3 * 2 * output.numel() * module.in_features)

    hooks = [module.register_forward_hook(count) for module in method.modules()]
    method.project(views_of(2, side))
    for hook in hooks:
        hook.remove()
    return sum(counted) / 2


@pytest.mark.parametrize(("width", "depth", "side"), [(0.125, 10, 16), (0.25, 10, 24), (0.125, 50, 16)])
def test_flops_are_those_of_a_count_by_hand(width, depth, side):
    method = make_method(width, depth)
    assert flops_per_image(method, views_of(3, side), AUTOCAST) == flops_by_hand(method, side)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_live_bytes_are_those_of_tensors_that_are_alive():
    layer, x = nn.Linear(7, 5), torch.randn(10, 7)
    with LiveBytes([layer, x]) as live:
        y = layer(x)
        assert live.peak == y.nbytes == 10 * 5 * 4
        z = torch.cat((y, y))
        del y
        assert live.peak == 3 * z.nbytes // 2
        again = z + 1  # where the first is gone
        assert live.peak == 2 * z.nbytes
        again.view(-1).t()
        assert live.peak == 2 * z.nbytes


def test_activations_grow_with_the_batch_and_shrink_where_they_are_computed_again():
    method = make_method(depth=50)
    whole = activation_bytes_per_image(method, views_of(8), AUTOCAST)
    assert activation_bytes_per_image(method, views_of(4), AUTOCAST) == pytest.approx(whole, rel=0.01)
    assert activation_bytes_per_image(method, views_of(8, side=32), AUTOCAST) == pytest.approx(4 * whole, rel=0.1)
    # At least what each layer's output takes, in float32
    outputs = []
    layers = [module for module in method.encoder.modules() if isinstance(module, nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda *seen: outputs.append(seen[2].nbytes / 2)) for layer in layers]
    method.project(views_of(2))
    for hook in hooks:
        hook.remove()
    assert whole > sum(outputs)
    checkpoint_activations(method.encoder)
    assert activation_bytes_per_image(method, views_of(8), AUTOCAST) < 0.6 * whole


def test_state_is_parameters_gradients_and_momentum():
    method = make_method()
    optimizer = LARS(param_groups(method, 1e-4), lr=0.1, backend="reference")
    num = sum(parameter.numel() for parameter in method.parameters())
    assert state_bytes(method, optimizer, zero_stage=0, world_size=1) == 8 * num
    method.project(views_of(4))[0].square().sum().backward()
    optimizer.step()
    assert state_bytes(method, optimizer, zero_stage=0, world_size=1) == 12 * num
