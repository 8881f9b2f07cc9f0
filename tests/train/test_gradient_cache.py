"""GradCache: gradients of the whole batch through micro-batches, to rounding; buffers and metrics as of one pass."""

import pytest
import torch

from model.build import ModelConfig, build_method
from model.heads import ProjectionHeadConfig
from model.resnet import EncoderConfig
from train.gradient_cache import Cotangents, cached_projections, loss_gradients, micro_batches, surrogate

NUM_IMAGES = 12
CONFIG = ModelConfig(
    encoder=EncoderConfig(depth=10, width=0.125, stem="cifar"),
    projection_head=ProjectionHeadConfig(hidden_dim=16, out_dim=8),
    temperature=0.2,
)


def method_and_views(config=CONFIG):
    """In float64, every γ away from the 0 that would close the blocks; statistics that no batch has."""
    method = build_method(config, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in method.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    image, *noise = torch.randn(3, NUM_IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    return method, [image + 0.5 * n for n in noise]


def gradients_by_cache(method, views, size):
    cached = loss_gradients(method, cached_projections(method, views, size))
    gradients = zip(*(torch.split(gradient, size) for gradient in cached.by_projection), strict=True)
    of_parameters = cached.by_parameter
    for piece, of_piece in zip(micro_batches(views, size), gradients, strict=True):
        surrogate(method, method.project(piece), Cotangents(list(of_piece), of_parameters)).backward()
        of_parameters = {}
    return cached, {name: parameter.grad.clone() for name, parameter in method.named_parameters()}


def gradients_whole(method, views):
    loss, metrics = method(views)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in method.named_parameters()}
    method.zero_grad()
    return loss.detach(), metrics, gradients


@pytest.mark.parametrize("size", [1, 3, 5, 12])
@pytest.mark.parametrize("changes", [{}, {"loss": "nt_logistic", "learn_temperature": True}])
def test_any_size_gives_the_gradient_of_the_whole_batch(size, changes):
    """With batch norm's running statistics, which are the same for every micro-batch."""
    method, views = method_and_views(ModelConfig(**{**vars(CONFIG), **changes}))
    method.eval()
    loss, metrics, expected = gradients_whole(method, views)
    cached, gradients = gradients_by_cache(method, views, size)
    torch.testing.assert_close(cached.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(cached.metrics, metrics, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-13)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_plain_accumulation_is_far_off():
    """What the cache is for: the loss of each third of the batch, which lacks two thirds of the negatives."""
    method, views = method_and_views()
    method.eval()
    _, _, expected = gradients_whole(method, views)
    for piece in micro_batches(views, 4):
        (method(piece)[0] / 3).backward()
    off, norm = (
        sum(value.square().sum() for value in values).sqrt()
        for values in (
            [parameter.grad - expected[name] for name, parameter in method.named_parameters()],
            expected.values(),
        )
    )
    assert off / norm > 0.05


def test_both_passes_see_the_same_projections_and_buffers_move_once():
    method, views = method_and_views()
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    first = cached_projections(method, views, 5)
    torch.testing.assert_close(dict(method.named_buffers()), before, rtol=0, atol=0)
    second = [method.project(piece) for piece in micro_batches(views, 5)]
    for cached, *pieces in zip(first, *second, strict=True):
        assert torch.equal(cached, torch.cat(pieces))
    assert method.encoder.bn1.num_batches_tracked == 3
    assert not first[0].requires_grad


def test_surrogate_of_known_numbers():
    method, _ = method_and_views()
    z = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = method.encoder.bn1.weight
    given = Cotangents([torch.tensor([[0.5, -4.0]])], {"encoder.bn1.weight": torch.full_like(weight, 3.0)})
    value = surrogate(method, [z], given)
    assert value.item() == pytest.approx(-7.5 + 3 * weight.sum().item())
    value.backward()
    assert z.grad.tolist() == [[0.5, -4.0]]
    assert weight.grad.unique().tolist() == [3.0]
