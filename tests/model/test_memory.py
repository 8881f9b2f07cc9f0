"""The memory: its loss against whole matrices, its queue against a list, its network against a loop."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model.heads import ProjectionHeadConfig
from model.losses.contrastive import ContrastiveLoss
from model.losses.memory_nt_xent import memory_nt_xent, memory_nt_xent_reference, unit_rows
from model.memory import MemoryConfig
from model.methods.simclr_memory import SimCLRWithMemory
from model.ntxent.loss import nt_xent
from model.resnet import EncoderConfig
from train.gradient_cache import Cotangents, cached_projections, loss_gradients, micro_batches, surrogate

ENCODER = EncoderConfig(depth=10, width=0.125, stem="cifar")
HEAD = ProjectionHeadConfig(hidden_dim=16, out_dim=8)


def rows(seed, num_rows, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_rows, dim, generator=generator, dtype=torch.float64))


def method(size=20, decay=0.9, seed=0, **options):
    torch.manual_seed(seed)
    built = SimCLRWithMemory(
        ENCODER, HEAD, ContrastiveLoss(temperature=0.3, **options), MemoryConfig(size=size, ema_decay=decay)
    ).double()
    for name, parameter in built.named_parameters():
        if parameter.ndim == 1 and "temperature" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # γ = 0 would close the blocks
    return built


def views(seed, num_images=6):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, num_images, 3, 8, 8, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("tile_size", [None, 1, 3, 4])
@pytest.mark.parametrize(("num_rows", "num_kept", "size"), [(14, 9, 9), (14, 4, 9), (2, 3, 3), (14, 0, 9), (2, 0, 1)])
def test_loss_and_gradients_are_the_formulas(tile_size, num_rows, num_kept, size):
    q, k, m = rows(0, num_rows).requires_grad_(), rows(1, num_rows), rows(2, size)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    filled = torch.arange(size) < num_kept
    found = memory_nt_xent(q, k, m, filled, temperature=temperature, tile_size=tile_size)
    ours = torch.autograd.grad(2.5 * found.loss, (q, temperature))
    loss, accuracy = memory_nt_xent_reference(q, k, m[:num_kept], temperature=temperature)
    theirs = torch.autograd.grad(2.5 * loss, (q, temperature))
    torch.testing.assert_close((found.loss, *ours), (loss, *theirs), rtol=1e-11, atol=1e-13)
    assert found.contrastive_accuracy == accuracy


def test_gradient_is_the_written_one():
    """−k_p(i) + Σ e^{s − L} k, with nothing of torch's differentiation in it."""
    q, k, m, temperature = rows(0, 6).requires_grad_(), rows(1, 6), rows(2, 4), 0.2
    memory_nt_xent(q, k, m, torch.ones(4, dtype=torch.bool), temperature=temperature).loss.backward()
    for i in range(6):
        others = torch.cat((torch.cat((k[:i], k[i + 1 :])), m))
        shares = (others @ q[i].detach() / temperature).softmax(0)
        expected = (shares @ others - k[(i + 3) % 6]) / temperature / 6
        torch.testing.assert_close(q.grad[i], expected, rtol=1e-12, atol=1e-14)


def test_without_memory_its_value_is_nt_xents():
    z = torch.randn(12, 5, dtype=torch.float64)
    u = unit_rows(z, normalize=True)
    nothing = torch.zeros(4, 5), torch.zeros(4, dtype=torch.bool)
    found = memory_nt_xent(u, u, *nothing, temperature=0.1)
    expected = nt_xent(z[:6], z[6:], temperature=0.1, backend="reference")
    torch.testing.assert_close((found.loss, found.contrastive_accuracy), tuple(expected))


def test_low_temperature_does_not_overflow():
    q, k, m = (rows(seed, 6).float().requires_grad_(seed == 0) for seed in range(3))
    loss = memory_nt_xent(q, k, m, torch.ones(6, dtype=torch.bool), temperature=0.002).loss
    loss.backward()
    expected, _ = memory_nt_xent_reference(q.double(), k.double(), m.double(), temperature=0.002)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert bool(q.grad.isfinite().all())


def test_the_queue_is_the_newest_keys():
    torch.manual_seed(0)
    memory, pushed = method(size=7).memory, []
    for count in (3, 3, 3, 20, 7, 1):
        keys = torch.randn(count, 8, dtype=torch.float64)
        memory.push(keys)
        pushed += list(keys)
        assert memory.filled().sum() == min(len(pushed), 7)
        held = {tuple(key.tolist()) for key in memory.queue[memory.filled()]}
        assert held == {tuple(key.tolist()) for key in pushed[-7:]}
    before = memory.queue.clone()
    memory.push(torch.full((3, 8), torch.nan), left_out=torch.tensor(True))
    torch.testing.assert_close(memory.queue, before)
    assert memory.num_pushed == len(pushed)


def test_the_network_follows():
    trained = method(decay=0.75)
    expected = {name: value.clone() for name, value in trained.memory.encoder.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in trained.encoder.parameters():
                parameter.add_(step + 1)
        left_out = torch.tensor(step == 1)
        trained.memory.follow(trained.encoder, trained.projection_head, left_out)
        for name, parameter in trained.encoder.named_parameters():
            if step != 1:
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach()
    found = dict(trained.memory.encoder.named_parameters())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_step_is_the_formula_on_what_both_networks_say():
    trained = method()
    for seed in range(3):  # the third meets two batches in the memory
        batch = views(seed)
        twin, kept = copy.deepcopy(trained), trained.memory.queue[trained.memory.filled()].clone()
        loss, metrics = trained(batch)
        loss.backward()
        q = F.normalize(twin.projection_head(twin.encoder(torch.cat(batch))))
        k = F.normalize(twin.memory.projection_head(twin.memory.encoder(torch.cat(batch))))
        expected, accuracy = memory_nt_xent_reference(q, k, kept, temperature=0.3)
        torch.testing.assert_close((loss, metrics["contrastive_accuracy"]), (expected, accuracy))
        torch.testing.assert_close(trained.memory.encoder.bn1.running_mean, twin.memory.encoder.bn1.running_mean)
        trained.after_step(seed + 1)
        torch.testing.assert_close(trained.memory.queue[trained.memory.filled()][len(kept) :], k[: 20 - len(kept)])
        assert all(parameter.grad is None for parameter in trained.memory.parameters())
    assert all(p.grad.abs().sum() > 0 for p in (*trained.encoder.parameters(), *trained.projection_head.parameters()))


def test_micro_batches_have_the_gradient_of_the_whole_batch():
    """In evaluation mode, where batch norm does not tell a micro-batch from a batch."""
    trained = method(learn_temperature=True).eval()
    trained.memory.push(rows(4, 9, 8))
    batch = views(0)
    loss, _ = trained(batch)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
    new_keys = trained._new_keys
    trained.zero_grad()
    cached = loss_gradients(trained, cached_projections(trained, batch, 2))
    torch.testing.assert_close(trained._new_keys, new_keys)
    by_piece = zip(*(torch.split(part, 2) for part in cached.by_projection), strict=True)
    for i, (piece, gradients) in enumerate(zip(micro_batches(batch, 2), by_piece, strict=True)):
        given = Cotangents(list(gradients), cached.by_parameter if i == 2 else {})
        surrogate(trained, trained.project(piece), given).backward()
    torch.testing.assert_close(cached.loss, loss.detach())
    found = {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert "contrastive_loss.log_temperature" in found


def stepped(trained, seeds):
    """Plain gradient steps; the losses."""
    losses = []
    for seed in seeds:
        loss, _ = trained(views(seed))
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.1 * gradient
        trained.after_step(seed + 1)
        losses.append(loss.item())
    return losses


def test_a_step_moves_the_network():
    trained = method(decay=0.75)
    before = {name: value.clone() for name, value in trained.memory.projection_head.named_parameters()}
    stepped(trained, [0])
    for name, parameter in trained.projection_head.named_parameters():
        expected = 0.75 * before[name] + 0.25 * parameter.detach()
        torch.testing.assert_close(trained.memory.projection_head.get_parameter(name), expected, msg=name)
        assert not torch.equal(expected, before[name])


def test_what_is_saved_goes_on_bit_for_bit():
    whole, first, resumed = method(), method(), method(seed=5)
    expected = stepped(whole, range(5))
    stepped(first, range(3))
    resumed.load_state_dict(first.state_dict())
    assert stepped(resumed, range(3, 5)) == expected[3:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_without_a_head_keys_are_as_wide_as_h():
    trained = SimCLRWithMemory(ENCODER, ProjectionHeadConfig(num_layers=0), ContrastiveLoss(), MemoryConfig(size=20))
    loss, _ = trained.double()(views(0))
    trained.after_step(1)
    assert loss.isfinite()
    assert trained.memory.queue[:12].norm(dim=1).allclose(torch.ones(12, dtype=torch.float64))


def test_other_weights_are_followed_from_the_start():
    trained, other = method(), method(seed=1)
    started_as = SimCLRWithMemory(ENCODER, HEAD, ContrastiveLoss(), MemoryConfig(size=1))
    torch.testing.assert_close(started_as.memory.encoder.state_dict(), started_as.encoder.state_dict())
    trained.memory.push(rows(0, 4, 8))
    trained.encoder.load_state_dict(other.encoder.state_dict())
    trained.weights_replaced()
    torch.testing.assert_close(trained.memory.encoder.state_dict(), other.encoder.state_dict())
    assert not trained.memory.filled().any()


def test_is_built_without_storage():
    with torch.device("meta"):
        assert all(value.is_meta for value in method().state_dict().values())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"`model.memory.size` must be at least 0 \(none\), got -1"):
        MemoryConfig(size=-1)
    with pytest.raises(ValueError, match=r"`model.memory.ema_decay` must be in \[0, 1\), got 1"):
        MemoryConfig(ema_decay=1)
    with pytest.raises(ValueError, match=r"`model.memory.size` needs `model.loss` nt_xent, got 'nt_logistic'"):
        method(name="nt_logistic")
    with pytest.raises(ValueError, match=r"`model.memory.size` needs `model.exchange` all_gather, got 'ring'"):
        method(exchange="ring")
