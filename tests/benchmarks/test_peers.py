"""The peers do the work that they are said to do: their formulas' values, and batches of the right kind."""

import numpy as np
import pytest
import torch

from benchmarks.peers.jpeg_decode import jpeg_decode
from benchmarks.peers.lars_forms import ApexLARC, LightlyLARS
from benchmarks.peers.nt_xent_forms import google_nt_xent, lightly_nt_xent
from benchmarks.peers.torchvision_pipeline import Colors, TwoViews, two_views
from model.ntxent.reference import nt_xent_reference
from tests.pipelines.betons import make_beton


@pytest.mark.parametrize(("form", "factor"), [(google_nt_xent, 2.0), (lightly_nt_xent, 1.0)])
def test_nt_xent_and_its_gradient_are_the_papers(form, factor):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 13, 7, generator=generator, dtype=torch.float64).requires_grad_()
    exact, _ = nt_xent_reference(z[0], z[1], temperature=0.2, normalize=True)
    (exact_grad,) = torch.autograd.grad(exact, z)
    loss = form(z[0], z[1], 0.2)
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, factor * exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(grad, factor * exact_grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", [LightlyLARS, ApexLARC])
def test_lars_forms_by_hand(form):
    # p = (3, 4), g = (0.6, 0.8), λ = 0.2, η = 0.1: r = 0.1 · 5 / (1 + 0.2 · 5) = 0.25; g + λp = (1.2, 1.6)
    # v = r (g + λp) = (0.3, 0.4); p = p − 2 v = (2.4, 3.2). A second step with the same gradient:
    # r = 0.1 · 4 / (1 + 0.2 · 4) = 2/9; g + λp = (1.08, 1.44); v = 0.5 (0.3, 0.4) + (0.24, 0.32) = (0.39, 0.52)
    param = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    options = {"lr": 2.0, "momentum": 0.5, "trust_coefficient": 0.1}
    optimizer = form([{"params": [param], "weight_decay": 0.2}], **options)
    for expected in ([2.4, 3.2], [1.62, 2.16]):
        param.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(param.data, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_lightlys_form_does_not_scale_what_is_not_decayed():
    param = torch.nn.Parameter(torch.tensor([3.0]))
    param.grad = torch.tensor([0.5])
    LightlyLARS([{"params": [param], "weight_decay": 0.0}], lr=2.0, momentum=0.5, trust_coefficient=0.1).step()
    assert param.item() == 2.0


@pytest.mark.parametrize("encode", ["jpeg", "raw"])
@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_torchvision_makes_two_views_of_the_stored_image(tmp_path, kind, encode):
    beton = make_beton(tmp_path, [(40, 30), (31, 50)], encode=encode)
    colors = Colors(jitter=(0.8, 0.8, 0.8, 0.2), gray_prob=0.2, blur_kernel=3)
    torch.manual_seed(0)
    first, second = TwoViews(beton, kind, two_views(24, colors))[1]
    assert first.shape == second.shape == (3, 24, 24)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, second)
    image = TwoViews(beton, kind, lambda image: image)[1][0]
    assert tuple(image.size if kind == "pil" else image.shape) == ((31, 50) if kind == "pil" else (3, 50, 31))


def test_the_bare_decoder_decodes_and_refuses(tmp_path):
    beton = make_beton(tmp_path, [(40, 30), (31, 50), (64, 64)])
    jpeg_decode(beton.path, 2)(8)
    data = np.fromfile(beton.path, np.uint8)
    data[beton.offsets[1] : beton.offsets[1] + 100] = 0
    data.tofile(beton.path)
    with pytest.raises(ValueError, match=r"sample 1 of .* cannot be decoded: .*JPEG"):
        jpeg_decode(beton.path, 2)(8)
