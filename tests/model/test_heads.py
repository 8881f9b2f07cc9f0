"""The projection head against google's head written out."""

import pytest
import torch
import torch.nn.functional as F

from model.heads import ProjectionHead, ProjectionHeadConfig


def batch_norm(x, scale, offset=0.0):
    return scale * (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() + offset


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_equals_dense_norm_relu_written_out(num_layers):
    head = ProjectionHead(7, ProjectionHeadConfig(num_layers=num_layers, hidden_dim=5, out_dim=3)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    h = torch.randn(11, 7, generator=generator, dtype=torch.float64)
    x, *parameters = h, *head.parameters()
    for _ in range(num_layers - 1):
        dense, scale, offset, *parameters = parameters
        x = F.relu(batch_norm(x @ dense.T, scale, offset))
    dense, scale = parameters  # the last layer: no offset, no ReLU
    torch.testing.assert_close(head(h), batch_norm(x @ dense.T, scale), rtol=1e-12, atol=1e-12)


def test_hidden_width_is_the_encoders():
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in ProjectionHead(2048, ProjectionHeadConfig()).parameters()]
    assert shapes == [(2048, 2048), (2048,), (2048,), (128, 2048), (128,)]


def test_a_prefix_of_the_head_stands_alone():
    head = ProjectionHead(4, ProjectionHeadConfig(num_layers=3, out_dim=2)).eval()
    h = torch.randn(6, 4)
    torch.testing.assert_close(head.layers[1:](head.layers[:1](h)), head(h))


def test_dense_weights_start_small():
    torch.manual_seed(0)
    head = ProjectionHead(512, ProjectionHeadConfig())
    assert head.layers[0][0].weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_without_layers_z_is_h():
    head = ProjectionHead(7, ProjectionHeadConfig(num_layers=0, out_dim=3))
    h = torch.randn(5, 7)
    assert torch.equal(head(h), h)
    assert list(head.parameters()) == []


@pytest.mark.parametrize(("name", "low"), [("num_layers", 0), ("out_dim", 1), ("hidden_dim", 1)])
def test_bad_configs_are_named(name, low):
    with pytest.raises(ValueError, match=rf"`model.projection_head.{name}` must be .*at least {low}, got {low - 1}"):
        ProjectionHeadConfig(**{name: low - 1})
