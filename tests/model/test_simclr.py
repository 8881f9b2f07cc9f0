"""SimCLR assembled from its parts, and what its metrics say."""

import pytest
import torch

from model.heads import ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss
from model.methods.simclr import SimCLR, projection_std
from model.ntxent.loss import nt_xent
from model.resnet import EncoderConfig


@pytest.fixture
def method():
    torch.manual_seed(0)
    encoder = EncoderConfig(depth=10, width=0.125, stem="cifar")
    return SimCLR(encoder, ProjectionHeadConfig(out_dim=8), ContrastiveLoss(temperature=0.2))


def test_loss_of_both_views_as_one_batch(method):
    views = [torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8) + 1]
    loss, metrics = method(views)
    assert method.encoder.bn1.num_batches_tracked == 1  # one pass, hence one set of statistics, for both views
    z = method.projection_head(method.encoder(torch.cat(views)))
    expected = nt_xent(z[:6], z[6:], temperature=0.2, backend="reference")
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(metrics["contrastive_accuracy"], expected.contrastive_accuracy)
    torch.testing.assert_close(metrics["projection_std"], projection_std(z))
    assert not any(value.requires_grad for value in metrics.values())
    method.after_step(0)


def test_every_parameter_learns(method):
    for module in method.modules():
        if hasattr(module, "running_mean"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)  # γ = 0 would close the blocks
    method([torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)])[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_projection_std_of_known_clouds():
    torch.manual_seed(0)
    # Even on the sphere each coordinate has variance 1/D: the mean of 16 such estimates from 20,000 rows.
    assert projection_std(torch.randn(20_000, 16) * 5).item() == pytest.approx(1, abs=0.005)
    assert projection_std(torch.ones(10, 16)).item() == pytest.approx(0, abs=1e-6)
    # Two opposite points: ±1 in one of four dimensions, so √4·(1 + 0 + 0 + 0)/4.
    assert projection_std(torch.tensor([[2.0, 0, 0, 0], [-7.0, 0, 0, 0]])).item() == pytest.approx(0.5)


def test_number_of_views_is_checked(method):
    with pytest.raises(ValueError, match="SimCLR takes 2 views of each image, got 3"):
        method([torch.ones(2, 3, 8, 8)] * 3)
