"""The online probe against its formulas in float64, on several ranks, and what it takes from training passes."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from pipelines.build import ImageFolder
from tests.distributed.ranks import run_ranks
from tests.pipelines.betons import make_beton, natural_image
from tests.train.host_reads import HostReads
from train.gradient_cache import cached_projections, micro_batches
from train.online.linear_probe import LinearProbe, count_classes
from train.online.representation_tap import RepresentationTap, labels_of_rows

WIDTH, CLASSES, IMAGES, VIEWS, STEPS = 11, 5, 12, 2, 7
LR, MOMENTUM = 5.0, 0.9
CPU = torch.device("cpu")


def make_probe():
    return LinearProbe(WIDTH, CLASSES, lr=LR, momentum=MOMENTUM, device=CPU)


def batch_of(step, num_unlabelled=4):
    """Representations [V, N, D] about the centre of their class, and labels [N]."""
    generator = torch.Generator().manual_seed(step)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    h = centres[labels] + torch.randn(VIEWS, IMAGES, WIDTH, generator=generator)
    labels[:num_unlabelled] = -1
    return h, labels


def formula(batches):
    """Weight [C, D + 1], its momentum and the metrics of each step: softmax regression by momentum SGD, in float64.

    The gradient is divided by the mean square of a row.
    """
    weight = np.zeros((CLASSES, WIDTH + 1))
    velocity, metrics = np.zeros_like(weight), []
    for h, labels in batches:
        of_rows = labels.repeat(VIEWS).numpy()
        rows = h.reshape(-1, WIDTH).double().numpy()[of_rows >= 0]
        rows, of_rows = np.hstack([rows, np.ones((len(rows), 1))]), of_rows[of_rows >= 0]
        logits = rows @ weight.T
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        loss = -np.log(chances[np.arange(len(rows)), of_rows]).mean()
        metrics.append((loss, (logits.argmax(1) == of_rows).mean()))
        gradient = (chances - np.eye(CLASSES)[of_rows]).T @ rows / len(rows)
        velocity = MOMENTUM * velocity + gradient / (rows**2).sum(1).mean()
        weight = weight - LR * velocity
    return weight, velocity, metrics


def assert_close_to_formula(probe, metrics, batches):
    weight, velocity, expected = formula(batches)
    state = {name: value.double().numpy() for name, value in probe.state_dict().items()}
    np.testing.assert_allclose(np.hstack([state["weight"], state["bias"][:, None]]), weight, rtol=1e-4, atol=1e-6)
    momentum = np.hstack([state["weight.momentum"], state["bias.momentum"][:, None]])
    np.testing.assert_allclose(momentum, velocity, rtol=1e-4, atol=1e-6)
    found = [(float(step["probe_loss"]), float(step["probe_accuracy"])) for step in metrics]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_update_is_that_of_the_formula():
    probe, batches = make_probe(), [batch_of(step) for step in range(STEPS)]
    metrics = [probe.step(h.flatten(0, 1), labels) for h, labels in batches]
    assert_close_to_formula(probe, metrics, batches)
    assert float(metrics[0]["probe_loss"]) == pytest.approx(math.log(CLASSES))
    assert 0.5 < float(metrics[-1]["probe_accuracy"]) < 1.0, "the problem must be neither trivial nor hopeless"


def test_pieces_of_a_batch_are_as_the_whole():
    """In each micro-batch one view stands after the other."""
    whole, pieces = make_probe(), make_probe()
    for h, labels in (batch_of(step) for step in range(STEPS)):
        whole.step(h.flatten(0, 1), labels)
        pieces.step([piece.flatten(0, 1) for piece in h.split(4, dim=1)], labels)
    torch.testing.assert_close(pieces.state_dict(), whole.state_dict())


def test_the_scale_of_representations_changes_nothing():
    """But for the bias, which has a scale of its own."""
    probes, losses = (make_probe(), make_probe()), []
    for h, labels in (batch_of(step) for step in range(STEPS)):
        found = [probe.step(s * h.flatten(0, 1), labels) for probe, s in zip(probes, (1e3, 1e6), strict=True)]
        losses.append([float(metrics["probe_loss"]) for metrics in found])
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)


def test_labels_follow_the_rows():
    pieces = [torch.empty(6, 1), torch.empty(2, 1)]
    assert labels_of_rows(pieces, torch.tensor([7, 8, 9, 4])).tolist() == [7, 8, 9, 7, 8, 9, 4, 4]


def test_a_batch_without_labels_gives_no_gradient():
    probe = make_probe()
    h, _ = batch_of(0)
    metrics = probe.step(h.flatten(0, 1), torch.full((IMAGES,), -1))
    assert math.isnan(metrics["probe_loss"])
    assert all(not value.any() for value in probe.state_dict().values())


def test_what_is_not_finite_does_not_stay():
    """A step that the run leaves out must not end the probe."""
    probe = make_probe()
    h, labels = batch_of(0)
    broken = h.clone()
    broken[0, 5, 3] = math.nan
    probe.step(broken.flatten(0, 1), labels)
    assert all(not value.any() for value in probe.state_dict().values())
    metrics = [probe.step(h.flatten(0, 1), labels)]
    assert_close_to_formula(probe, metrics, [(h, labels)])


def test_no_step_waits_for_the_device():
    probe, (h, labels) = make_probe(), batch_of(0)
    with HostReads() as reads:
        probe.step(list(h.flatten(0, 1).split(8)), labels)
    assert reads.found == set()


def test_a_state_goes_on_bit_for_bit():
    probe, resumed = make_probe(), make_probe()
    for step in range(3):
        h, labels = batch_of(step)
        probe.step(h.flatten(0, 1), labels)
    resumed.load_state_dict({name: value.clone() for name, value in probe.state_dict().items()})
    h, labels = batch_of(3)
    for each in (probe, resumed):
        each.step(h.flatten(0, 1), labels)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in probe.state_dict().items())


def test_a_state_of_other_classes_is_refused():
    other = LinearProbe(WIDTH, CLASSES + 1, lr=LR, momentum=MOMENTUM, device=CPU)
    with pytest.raises(ValueError, match=r"must have the tensors \{'weight': \[5, 11\].*got \{'weight': \[6, 11\]"):
        make_probe().load_state_dict(other.state_dict())


def check_ranks(rank):
    """A third of the batch has no label, and it lies on the first rank; at last one rank holds NaN."""
    probe, batches = make_probe(), [batch_of(step) for step in range(STEPS)]
    own = slice(rank * IMAGES // dist.get_world_size(), (rank + 1) * IMAGES // dist.get_world_size())
    metrics = [probe.step(h[:, own].flatten(0, 1), labels[own]) for h, labels in batches]
    assert_close_to_formula(probe, metrics, batches)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    h, labels = batch_of(STEPS)
    probe.step(h[:, own].flatten(0, 1) * (math.nan if rank == 1 else 1.0), labels[own])
    state = probe.state_dict()
    assert torch.equal(state["weight.momentum"], before["weight.momentum"] * MOMENTUM)
    return state


@pytest.mark.distributed
def test_ranks_take_the_step_of_the_whole_batch():
    first, second = run_ranks(check_ranks, 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_classes_are_counted(tmp_path):
    assert count_classes(make_beton(tmp_path / "b", [(9, 8)] * 6, num_classes=3)) == 3
    for name in ("a", "b"):
        path = tmp_path / "folder" / name / "0.png"
        path.parent.mkdir(parents=True)
        natural_image(8, 8, 0).save(path)
    assert count_classes(ImageFolder(tmp_path / "folder", 2)) == 2


def small_method():
    encoder = EncoderConfig(depth=10, width=0.125, stem="cifar")
    return build_method(ModelConfig(encoder=encoder, projection_head=ProjectionHeadConfig(out_dim=8)), seed=0)


def some_views():
    return list(torch.randn(VIEWS, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_the_tap_keeps_the_training_pass_alone():
    method, views = small_method(), some_views()
    tap = RepresentationTap(method.encoder)
    cached_projections(method, views, 2)
    with torch.no_grad():
        method.encoder(views[0])
    method.encoder.eval()
    method.encoder(views[0])
    assert tap.take() == []
    method.encoder.train()
    expected = [method.encoder(torch.cat(piece)) for piece in micro_batches(views, 2)]
    kept = tap.take()
    assert len(kept) == 3
    for rows, own in zip(kept, expected, strict=True):
        assert torch.equal(rows, own)
        assert not rows.requires_grad
        assert rows.data_ptr() != own.data_ptr()
    assert tap.take() == []
    tap.close()
    method.encoder(views[0])
    assert tap.take() == []


def test_the_tap_hears_once_where_the_inside_is_compiled_or_recomputed():
    method, views = small_method(), some_views()
    calls = []
    inside = method.encoder.forward

    def stands_in(x):
        calls.append(len(x))
        return torch.utils.checkpoint.checkpoint(inside, x, use_reentrant=False)

    method.encoder.forward = stands_in
    tap = RepresentationTap(method.encoder)
    loss, _ = method(views)
    loss.backward()
    assert calls == [12]
    assert [len(rows) for rows in tap.take()] == [12]


def test_the_tap_keeps_float32_of_an_autocast_pass():
    linear = nn.Linear(3, 2)
    tap = RepresentationTap(linear)
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(torch.ones(4, 3))
    (kept,) = tap.take()
    assert output.dtype == torch.bfloat16
    assert kept.dtype == torch.float32
    assert torch.equal(kept, output.float())
