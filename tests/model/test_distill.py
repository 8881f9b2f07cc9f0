"""Distillation against its formula in NumPy float64; what a teacher is, and is not, to its student."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.heads import ProjectionHeadConfig
from model.methods.distill import Distill, DistillConfig, distillation_loss, labelled_means
from model.methods.supervised import ClassifierConfig, Supervised
from model.resnet import EncoderConfig

ENCODER = EncoderConfig(depth=10, width=0.125, stem="cifar")
HEAD = ProjectionHeadConfig(num_layers=3, hidden_dim=6, out_dim=4)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logits(seed, num_rows=7, num_classes=5):
    return torch.randn(num_rows, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def built(seed, method, *more, num_classes=5, head_layers=0):
    torch.manual_seed(seed)
    network = method(ENCODER, HEAD, ClassifierConfig(num_classes=num_classes, head_layers=head_layers), *more)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and "classifier" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # γ = 0 would close the blocks
    return network


def student(**options):
    return built(1, Distill, DistillConfig(**options))


def taught(**options):
    learner, teacher = student(**options), built(2, Supervised, head_layers=1)
    learner.set_teacher(teacher)
    return learner, teacher


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_loss_and_gradient_are_the_formulas(temperature):
    s, t = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss = distillation_loss(s, t, temperature)
    (2.5 * loss).backward()
    ours, theirs = (softmax(x.detach().numpy() / temperature) for x in (s, t))
    assert loss.item() == pytest.approx(-(temperature**2) * (theirs * np.log(ours)).sum(1).mean(), rel=1e-12)
    np.testing.assert_allclose(s.grad, 2.5 * temperature * (ours - theirs) / len(ours), rtol=1e-11, atol=1e-14)
    assert t.grad is None


def test_labels_of_some_rows():
    s, labels = logits(0).requires_grad_(), torch.tensor([4, -1, 0, -1, -1, 2, -1])
    loss, accuracy = labelled_means(s, labels)
    loss.backward()
    rows, of = [0, 2, 5], [4, 0, 2]
    probabilities = softmax(s.detach().numpy())
    expected = np.zeros_like(probabilities)
    expected[rows] = probabilities[rows]
    expected[rows, of] -= 1
    assert loss.item() == pytest.approx(-np.log(probabilities[rows, of]).mean(), rel=1e-12)
    np.testing.assert_allclose(s.grad, expected / 3, rtol=1e-12, atol=1e-15)
    assert accuracy.item() == pytest.approx((probabilities[rows].argmax(1) == of).mean())


def test_a_batch_without_labels():
    s = logits(0).requires_grad_()
    loss, accuracy = labelled_means(s, torch.full((7,), -1))
    loss.backward()
    assert (loss.item(), accuracy.item()) == (0, 0)
    assert not s.grad.any()


def test_both_terms():
    method, s, t = student(temperature=0.5, label_weight=0.3), logits(0), logits(1)
    labels = torch.tensor([4, -1, 0, -1, -1, 2, -1])
    loss, metrics = method.loss([s, t], labels)
    cross_entropy = F.cross_entropy(s[[0, 2, 5]], torch.tensor([4, 0, 2]))
    torch.testing.assert_close(loss, 0.7 * distillation_loss(s, t, 0.5) + 0.3 * cross_entropy)
    torch.testing.assert_close(metrics["label_loss"], cross_entropy)
    assert metrics["agreement"].item() == pytest.approx((s.argmax(1) == t.argmax(1)).double().mean().item())
    assert not any(value.requires_grad for value in metrics.values())


def test_labels_without_weight_are_not_looked_at():
    method, s, t = student(temperature=0.5), logits(0), logits(1)
    with_labels, without = (method.loss([s, t], labels) for labels in (torch.zeros(7, dtype=torch.int64), None))
    torch.testing.assert_close(with_labels, without)
    assert "accuracy" not in with_labels[1]


def test_the_teacher_is_frozen_and_no_part_of_the_student():
    learner, teacher = taught()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    views = [torch.randn(6, 3, 8, 8)]
    learner.train()
    learner(views)[0].backward()
    assert not teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before)  # running statistics too
    alone = student()
    assert learner.state_dict().keys() == alone.state_dict().keys()
    assert [*dict(learner.named_parameters())] == [*dict(alone.named_parameters())]
    assert all(parameter.grad.abs().sum() > 0 for parameter in learner.parameters())
    assert learner.encoder.bn1.num_batches_tracked == 1


def test_what_the_student_learns_from_is_the_teachers_answer():
    learner, teacher = taught(temperature=0.5)
    views = [torch.randn(6, 3, 8, 8)]
    learner.train()
    loss, _ = learner(views)
    torch.testing.assert_close(loss, distillation_loss(learner.logits(views[0]), teacher.logits(views[0]), 0.5))


def test_the_teacher_moves_along():
    learner, teacher = taught()
    learner.double().to(memory_format=torch.channels_last)
    weight = teacher.encoder.layer1[0].conv1.weight
    assert weight.dtype == torch.float64
    assert weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        later = student()
    later.set_teacher(built(3, Supervised))
    assert later._teacher[0].classifier.weight.is_meta


def test_autocast_serves_both():
    learner, _ = taught()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = learner.project([torch.randn(4, 3, 8, 8)])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.requires_grad
    assert not theirs.requires_grad
    assert learner.loss([ours, theirs])[0].dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`model.classifier.num_classes` must be the teacher's 3, got 5"):
        student().set_teacher(built(0, Supervised, num_classes=3))
    with pytest.raises(ValueError, match=r"needs a teacher: name its run in `train.teacher`"):
        student()([torch.ones(2, 3, 8, 8)])
    with pytest.raises(ValueError, match=r"`model.distill.temperature` must be finite and above 0, got 0"):
        DistillConfig(temperature=0)
    with pytest.raises(ValueError, match=r"`model.distill.label_weight` must be in \[0, 1\), got 1"):
        DistillConfig(label_weight=1)
