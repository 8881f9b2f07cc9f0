"""NT-Xent's gradient for the temperature, against float64 autograd on the formula; on ranks: tests/distributed."""

import pytest
import torch

from model.ntxent.loss import nt_xent
from model.ntxent.reference import nt_xent_reference
from tests.model.test_ntxent import gradients, in_tiles, projections


def learned(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(("num_images", "dim", "tile_size"), [(1, 5, 512), (2, 3, 1), (41, 7, 16), (401, 33, 100)])
def test_it_is_the_formulas(num_images, dim, tile_size, value, normalize, upstream):
    z1, z2 = projections(num_images, dim)
    ours, theirs = learned(value), learned(value)
    loss, _ = in_tiles(z1, z2, temperature=ours, normalize=normalize, tile_size=tile_size)
    expected, _ = nt_xent_reference(z1, z2, temperature=theirs, normalize=normalize)
    # A sum over the similarities, some of them 1/τ, of terms that cancel; then the chain to τ: another 1/τ.
    torch.testing.assert_close(
        gradients(loss, ours, upstream=upstream), gradients(expected, theirs, upstream=upstream), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    def loss(z1, z2, temperature):
        return in_tiles(z1, z2, temperature=temperature, normalize=normalize, tile_size=3)[0]

    assert torch.autograd.gradcheck(loss, (*projections(7, 4), learned(0.3)))


def test_a_zero_row_has_no_part_in_it():
    """Where the norm stands at its bound, the similarity still goes with 1/τ."""
    z1, z2 = (z.detach() for z in projections(5, 4))
    z1[0], z2[3] = 0, 1e-8 * z2[3]
    ours, theirs = learned(0.5), learned(0.5)
    loss = nt_xent(z1, z2, temperature=ours).loss
    expected = nt_xent(z1, z2, temperature=theirs, backend="reference").loss
    torch.testing.assert_close(gradients(loss, ours), gradients(expected, theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_dtype_is_its_own(dtype):
    """The loss is computed in fp32 of the rounded inputs; the gradient is rounded at the end, for each its own way."""
    z1, z2 = projections(41, 16, dtype)
    wide1, wide2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    for own in (torch.float32, torch.float64, dtype):
        ours, theirs = learned(0.25, own), learned(0.25)
        loss = nt_xent(z1, z2, temperature=ours).loss
        expected = nt_xent(wide1, wide2, temperature=theirs, backend="reference").loss
        (gradient,), (reference,) = gradients(loss, ours), gradients(expected, theirs)
        assert gradient.dtype == own
        tolerance = max(1e-5, torch.finfo(own).eps)
        assert gradient.item() == pytest.approx(reference.item(), rel=tolerance)


def test_a_number_and_a_scalar_give_the_same_loss():
    z1, z2 = projections(41, 16)
    by_number, by_scalar = (nt_xent(z1, z2, temperature=t).loss for t in (0.25, torch.tensor(0.25).double()))
    assert torch.equal(by_number, by_scalar)
    assert all(map(torch.equal, gradients(by_number, z1, z2), gradients(by_scalar, z1, z2)))


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (torch.tensor([0.1]), r"a floating-point scalar tensor, got torch.float32 of shape \(1,\)"),
        (torch.tensor(1), r"a floating-point scalar tensor, got torch.int64 of shape \(\)"),
    ],
)
def test_other_tensors_are_refused(temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(torch.ones(2, 3), torch.ones(2, 3), temperature=temperature)
