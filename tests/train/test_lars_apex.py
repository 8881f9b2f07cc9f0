"""The backend out of NVIDIA apex's kernels: when it is refused, what it asks of them, and their work where they are."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from tests.train.lars_cases import assert_close_to, clone, expected_step, random_stretches
from train.optim import lars_apex
from train.optim.lars_backends import check_backend

WITHOUT_APEX = importlib.util.find_spec("amp_C") is None
VARIANTS = pytest.mark.parametrize(
    ("form", "nesterov"), [("classic", False), ("classic", True), ("larc", False), ("larc", True)]
)


@pytest.mark.skipif(not WITHOUT_APEX, reason="NVIDIA apex is installed")
def test_a_missing_apex_is_named():
    with pytest.raises(ValueError, match=r"^`optim\.backend` apex needs the package amp_C, which is not installed; "):
        check_backend("apex", "classic", torch.device("cuda"))


def test_the_form_that_apex_cannot_compute_is_refused():
    with pytest.raises(
        ValueError, match=r"^`optim\.backend` apex computes `optim\.form` classic or larc, got non_clas"
    ):
        check_backend("apex", "non_classic", torch.device("cuda"))


@VARIANTS
def test_steps_by_the_documented_kernels(form, nesterov, monkeypatch):
    """On the CPU, with the two kernels as the comments in apex's sources describe them."""
    monkeypatch.setitem(sys.modules, "amp_C", documented_kernels())
    check_step(random_stretches(form, nesterov))
    skipped = random_stretches(form, nesterov)
    before = clone(skipped)
    lars_apex.step(skipped, torch.tensor(True))
    assert all(map(torch.equal, skipped.params + skipped.buffers, before.params + before.buffers))


@pytest.mark.gpu
@pytest.mark.skipif(WITHOUT_APEX, reason="needs NVIDIA apex's extension amp_C")
@VARIANTS
def test_steps_on_a_gpu(form, nesterov):
    stretches = random_stretches(form, nesterov)
    check_step(
        stretches._replace(**{name: [x.cuda() for x in getattr(stretches, name)] for name in stretches._fields[:3]})
    )


def check_step(stretches):
    expected, grads = expected_step(stretches), [grad.clone() for grad in stretches.grads]
    lars_apex.step(stretches, torch.tensor(False, device=grads[0].device))
    assert all(map(torch.equal, stretches.grads, grads)), "gradients are read only"
    on_host = clone(stretches)
    for tensors in on_host[:3]:
        tensors[:] = [x.cpu() for x in tensors]
    assert_close_to(on_host, expected, rtol=1e-6)


def documented_kernels():
    """`amp_C` in torch: multi_tensor_l2norm_kernel.cu and multi_tensor_sgd_kernel.cu, for float32."""

    def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor):
        assert chunk_size > 0
        assert noop_flag.dtype == torch.int32
        assert all(x.ndim == 1 and x.is_contiguous() for x in tensor_lists[0])
        norms = torch.stack([x.norm() for x in tensor_lists[0]])
        return norms.norm()[None], norms if per_tensor else norms[:0]

    def multi_tensor_sgd(
        chunk_size, noop_flag, tensor_lists, wd, momentum, dampening, lr, nesterov, first_run, wd_after_momentum, scale
    ):
        assert chunk_size > 0
        assert not wd_after_momentum
        if noop_flag.item():
            return
        for grad, weight, mom in zip(*tensor_lists, strict=True):
            incoming = grad * scale + wd * weight
            if momentum != 0:
                mom.copy_(incoming if first_run else momentum * mom + (1 - dampening) * incoming)
                incoming = incoming + momentum * mom if nesterov else mom
            weight.sub_(lr * incoming)

    module = ModuleType("amp_C")
    module.multi_tensor_l2norm, module.multi_tensor_sgd = multi_tensor_l2norm, multi_tensor_sgd
    return module
