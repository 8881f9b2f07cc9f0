"""Supervised training: the network is what it says, and the loss torch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.methods.supervised import ClassifierConfig
from model.resnet import EncoderConfig

ENCODER = EncoderConfig(depth=10, width=0.125, stem="cifar")


def make(head_layers=0, num_layers=3, **options):
    config = ModelConfig(
        method="supervised",
        encoder=ENCODER,
        projection_head=ProjectionHeadConfig(num_layers=num_layers, hidden_dim=24, out_dim=6),
        classifier=ClassifierConfig(num_classes=5, head_layers=head_layers, **options),
    )
    return build_method(config, seed=4)


def images(num_images=8):
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("head_layers", "width"), [(0, 64), (1, 24), (2, 24), (3, 6)])
def test_the_classifier_sits_on_the_kept_layers(head_layers, width):
    method = make(head_layers)
    x, h = images(), method.encoder(images())
    state = method.state_dict()
    for k in range(head_layers):
        layer = f"projection_head.layers.{k}"
        h = h @ state[f"{layer}.0.weight"].T
        h = F.batch_norm(h, None, None, state[f"{layer}.1.weight"], state.get(f"{layer}.1.bias"), training=True)
        h = h.relu() if k < 2 else h
    expected = h @ state["classifier.weight"].T + state["classifier.bias"]
    assert method.classifier.in_features == width
    torch.testing.assert_close(method.project([x])[0], expected, rtol=1e-4, atol=1e-5)
    assert sum(name.startswith(f"projection_head.layers.{head_layers}") for name in state) == 0


def test_the_loss_is_the_cross_entropy_and_accuracy_counts_right_rows():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1])
    loss, metrics = make().loss([logits], labels)
    rows = [math.log(math.exp(2) + 4) - 2, math.log(math.exp(3) + 4)]
    assert loss.item() == pytest.approx(sum(rows) / 2)
    assert metrics["accuracy"].item() == 0.5


def test_smoothed_labels_share_out_part_of_the_target():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    target = F.one_hot(labels, 5) * 0.9 + 0.02
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    loss, _ = make(label_smoothing=0.1).loss([logits], labels)
    torch.testing.assert_close(loss, expected)


def test_weights_start_as_published():
    method = make()
    assert method.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not method.classifier.bias.any()


def test_more_layers_than_the_head_has_are_refused():
    with pytest.raises(ValueError, match=r"`model.classifier.head_layers` must be at most the 2 layers .* got 3"):
        make(3, num_layers=2)
