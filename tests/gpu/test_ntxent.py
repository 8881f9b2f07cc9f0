"""NT-Xent on a GPU: the Triton kernels against the formula in float64, and what a training step asks of them."""

import pytest
import torch

from model.ntxent.loss import nt_xent
from tests.gpu.waiting import no_waiting
from tests.model.test_ntxent import projections

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# Of the gradient, relative to all of it, as in the interpreter; bfloat16 rounds the result by 2⁻⁹.
GRADIENT = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3 + 2**-9}
SIMILARITY = {torch.float32: 4 * 2**-23, torch.float16: 2**-9, torch.bfloat16: 2**-9}  # of 1/τ
SIZES = [(1, 3), (2, 17), (41, 41), (401, 401), (1271, 128), (1024, 256), (300, 1271), (1024, 2048), (4096, 128)]


def on_gpu(num_images, dim, dtype):
    return tuple(z.detach().cuda().requires_grad_() for z in projections(num_images, dim, dtype))


def gradients(loss, *inputs, upstream=1.0):
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))


def check(z1, z2, temperature, learned=False):
    """Hold the loss against the formula; returns loss and gradients."""
    dtype, upstream = z1.dtype, -1.0 * len(z1)  # so that float16 holds the gradients of many rows
    ours, theirs = (torch.tensor(temperature, device="cuda", dtype=t) for t in (torch.float32, torch.float64))
    loss, accuracy = nt_xent(z1, z2, temperature=ours.requires_grad_() if learned else temperature)
    inputs = (z1, z2, ours) if learned else (z1, z2)
    grads = gradients(loss, *inputs, upstream=upstream)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)] + [theirs.requires_grad_()]
    expected, expected_accuracy = nt_xent(*wide[:2], temperature=wide[2], backend="reference")
    expected_grads = gradients(expected, *wide, upstream=upstream)
    assert loss.item() == pytest.approx(expected.item(), abs=SIMILARITY[dtype] / temperature + 1e-6)
    assert accuracy.item() == pytest.approx(
        expected_accuracy.item(), abs=1e-6 if dtype == torch.float32 else 2 / len(z1) + 1e-3
    )
    grad, expected_grad = (torch.cat(pair[:2]).double() for pair in (grads, expected_grads))
    tolerance = GRADIENT[dtype] * max(1, 0.1 / temperature) ** 2
    assert (grad - expected_grad).norm() <= tolerance * expected_grad.norm()
    if learned:
        assert grads[2].item() == pytest.approx(expected_grads[2].item(), rel=10 * tolerance)
    return loss, grads


@pytest.mark.parametrize("dtype", GRADIENT)
@pytest.mark.parametrize(("num_images", "dim"), SIZES)
def test_loss_and_gradient_are_the_formulas(num_images, dim, dtype):
    check(*on_gpu(num_images, dim, dtype), 0.1)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5, 1.0, 20.0])
@pytest.mark.parametrize("dim", [41, 128, 401])
def test_every_temperature(dim, temperature):
    check(*on_gpu(1271, dim, torch.float32), temperature, learned=True)


@pytest.mark.parametrize("dtype", GRADIENT)
def test_a_learned_temperature_changes_nothing_else(dtype):
    z1, z2 = on_gpu(401, 128, dtype)
    (loss, grads), (expected, expected_grads) = (check(z1, z2, 0.1, learned) for learned in (True, False))
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads[:2], expected_grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_same_bits_every_time(dtype):
    z1, z2 = on_gpu(1271, 128, dtype)
    results = [(loss := nt_xent(z1, z2, temperature=0.1).loss, *gradients(loss, z1, z2)) for _ in range(5)]
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_inputs_may_lie_in_any_way():
    z1, z2 = (z.detach() for z in on_gpu(401, 41, torch.float16))
    expected = nt_xent(z1, z2, temperature=0.1).loss
    for other in (z1.repeat_interleave(3, dim=1)[:, ::3], z1.T.contiguous().T, z1.repeat_interleave(2, dim=0)[::2]):
        assert torch.equal(nt_xent(other, z2, temperature=0.1).loss, expected)


def test_rows_that_are_two_gigabytes_apart():
    z1, z2 = (z.detach() for z in on_gpu(4, 41, torch.float16))
    apart = torch.empty((4, 2**31 // 2 + 64), dtype=torch.float16, device="cuda")[:, :41]
    apart.copy_(z1)
    assert torch.equal(nt_xent(apart, z2, temperature=0.1).loss, nt_xent(z1, z2, temperature=0.1).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_log_sum_exps_too_far_apart_for_one_exponential(dtype):
    z1, z2 = torch.eye(6, 16).cuda().to(dtype), torch.eye(6, 16).roll(1, 0).cuda().to(dtype)
    z1[3:], z2[3:] = z1[0].clone(), z2[0].clone()
    z1[3:, 1] += 0.01 * torch.arange(3, device="cuda")
    check(z1.requires_grad_(), z2.requires_grad_(), 0.005)


@pytest.mark.parametrize("dim", [41, 128, 2048])
@pytest.mark.parametrize("dtype", GRADIENT)
def test_a_collapsed_encoder_earns_no_accuracy(dtype, dim):
    z = torch.randn(1, dim, device="cuda").to(dtype).expand(700, dim)
    assert nt_xent(z, z, temperature=0.1).contrastive_accuracy.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_it_neither_waits_for_the_device_nor_leaves_the_current_stream(dtype, learned):
    z1, z2 = on_gpu(401, 128, dtype)
    tau = torch.tensor(0.1, device="cuda", requires_grad=True) if learned else 0.1
    expected = nt_xent(z1, z2, temperature=tau).loss
    torch.autograd.backward(expected)  # compiles
    expected = expected.detach()  # the graph would hold z1 to this stream
    expected_grad, z1.grad = z1.grad, None
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with no_waiting(), torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # what comes after it on this stream comes late
        loss = nt_xent(z1, z2, temperature=tau).loss
        torch.autograd.backward(loss)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(loss, expected)
    assert torch.equal(z1.grad, expected_grad)


def test_no_similarity_matrix_is_ever_built():
    z1, z2 = on_gpu(8192, 128, torch.float16)
    torch.autograd.backward(nt_xent(z1, z2, temperature=0.1).loss)  # compiles
    z1.grad = z2.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.backward(nt_xent(z1, z2, temperature=0.1).loss)
    extra = torch.cuda.max_memory_allocated() - before
    # Rows and gradients of 4 MiB each; sums of 8 MiB for each of a few stretches. The matrix would take 512 MiB.
    assert extra < 64 * 2**20


@pytest.mark.parametrize("dtype", GRADIENT)
def test_compiled(dtype):
    z1, z2 = on_gpu(401, 128, dtype)

    def loss(z1, z2):
        return nt_xent(z1, z2, temperature=0.1).loss

    ours, theirs = (call(z1, z2) for call in (torch.compile(loss, fullgraph=True), loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for grad, expected in zip(gradients(ours, z1, z2), gradients(theirs, z1, z2), strict=True):
        torch.testing.assert_close(grad, expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-7)


def test_autocast_changes_nothing():
    z1, z2 = on_gpu(401, 128, torch.float32)
    expected = nt_xent(z1, z2, temperature=0.1).loss
    with torch.autocast("cuda", torch.bfloat16):
        loss = nt_xent(z1, z2, temperature=0.1).loss
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, gradients(loss, z1, z2), gradients(expected, z1, z2)))


def test_what_triton_does_not_serve_goes_in_tiles():
    for dtype, normalize in ((torch.float64, True), (torch.float32, False)):
        z1, z2 = on_gpu(41, 41, dtype)
        loss = nt_xent(z1, z2, temperature=2.0, normalize=normalize).loss
        assert torch.equal(loss, nt_xent(z1, z2, temperature=2.0, normalize=normalize, backend="tiled").loss)
        with pytest.raises(ValueError, match=r"backend 'triton' .*; use 'tiled'"):
            nt_xent(z1, z2, temperature=2.0, normalize=normalize, backend="triton")
