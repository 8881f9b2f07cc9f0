"""LARS on a GPU, in two launches, against the reference in float64."""

import pytest
import torch
from torch import nn

from tests.gpu.waiting import no_waiting
from tests.train.lars_stretches import EVERY_OPTION, FORMS, SIZES, cut, expected, norms, options, some, stretches
from train.optim import lars_loop
from train.optim.lars import LARS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

# p, g and v are of order 1, and each of the handful of float32 operations on them rounds by 2⁻²⁴ of that.
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def triton_backend():
    """Imported where there is a GPU, with which Triton comes."""
    from train.optim import lars_triton

    return lars_triton


def hold(whole, exact, rounding=ROUNDING):
    for ours, truth in zip((whole.params, whole.buffers), exact, strict=True):
        for tensor, right in zip(ours, truth, strict=True):
            torch.testing.assert_close(tensor.double().cpu(), right, **rounding)


def check(triton_backend, *arguments, rounding=ROUNDING, **keywords):
    whole = stretches(*arguments, **keywords, device="cuda")
    exact = expected(whole)
    triton_backend.step(whole, None)
    hold(whole, exact, rounding)


def clones(whole):
    return whole._replace(params=[p.clone() for p in whole.params], buffers=[v.clone() for v in whole.buffers])


def same(first, second):
    pairs = zip(first.params + first.buffers, second.params + second.buffers, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("each", EVERY_OPTION, ids=lambda o: f"{o.form}-{o.nesterov}-{o.adapt}")
def test_every_form_on_every_size(triton_backend, each):
    check(triton_backend, SIZES, each)


def test_hundreds_of_tensors_of_different_options(triton_backend):
    each = [EVERY_OPTION[i % len(EVERY_OPTION)]._replace(lr=0.01 * i) for i in range(400)]
    check(triton_backend, [1 + 97 * i for i in range(400)], each)


def test_a_tensor_of_28_million_elements(triton_backend):
    check(triton_backend, [28_000_003], options())


@pytest.mark.parametrize("offsets", [(1, 1, 1), (0, 3, 0), (2, 0, 1)])
def test_stretches_start_anywhere(triton_backend, offsets):
    check(triton_backend, SIZES, options("non_classic"), offsets=offsets)


@pytest.mark.parametrize("zeros", ["p", "g", "pg", "gv", "pgv"])
@pytest.mark.parametrize("form", FORMS)
def test_norms_that_are_zero(triton_backend, form, zeros):
    check(triton_backend, (41, 8193), options(form), zeros=zeros)
    check(triton_backend, (41, 8193), options(form, weight_decay=0.0), zeros=zeros)


@pytest.mark.parametrize("grads", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits(triton_backend, grads):
    check(triton_backend, SIZES, options(), grads=grads)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_parameters_in_16_bits(triton_backend, dtype, rtol):
    check(triton_backend, SIZES, options(), params=dtype, grads=dtype, rounding={"rtol": rtol, "atol": 1e-6})


def test_several_types_in_one_step(triton_backend):
    whole = stretches(SIZES, options(), device="cuda")
    for i in range(1, len(whole.grads), 2):
        whole.grads[i] = whole.grads[i].bfloat16()
    exact = expected(whole)
    triton_backend.step(whole, None)
    hold(whole, exact)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_are_shared_out(triton_backend, form):
    whole = stretches(SIZES, options(form, nesterov=True), device="cuda")
    exact, sums = expected(whole), norms(whole)
    parts = cut(whole, 3)
    indices = range(len(parts.params))
    ranks = [some(parts, [i for i in indices if i % 5 < 2]), some(parts, [i for i in indices if i % 5 >= 2])]
    ours = sum(triton_backend.squared_norms(rank) for rank in ranks)
    torch.testing.assert_close(ours.double().cpu(), sums, rtol=1e-6, atol=0)
    for rank in ranks:
        triton_backend.update(rank, ours, None)
    hold(whole, exact)


def test_a_skipped_step_changes_nothing(triton_backend):
    before = stretches(SIZES, options(), device="cuda")
    after, plain = clones(before), clones(before)
    triton_backend.step(after, torch.tensor(True, device="cuda"))
    assert same(before, after)
    triton_backend.step(after, torch.tensor(False, device="cuda"))
    triton_backend.step(plain, None)
    assert same(plain, after)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time(triton_backend, form):
    first = stretches((*SIZES, 3_000_000), options(form), device="cuda")
    second = clones(first)
    for _ in range(5):
        triton_backend.step(first, None)
        triton_backend.step(second, None)
    assert same(first, second)


def test_steps_that_are_queued_faster_than_they_run_take_their_own_rates(triton_backend):
    """The host is far ahead, where a table's memory that was used again too early would be one of a later step."""
    start = stretches(SIZES, options(), device="cuda")
    each = [[o._replace(lr=0.01 * i) for o in start.options] for i in range(1, 101)]
    one_by_one = clones(start)
    for step_options in each:
        triton_backend.step(one_by_one._replace(options=step_options), None)
        torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(2):  # in the second round all memory is there, and nothing waits
        queued = clones(start)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(500_000_000)
            for step_options in each:
                triton_backend.step(queued._replace(options=step_options), None)
            done = stream.query()
        stream.synchronize()
        assert same(one_by_one, queued)
    assert not done


def test_it_neither_waits_for_the_device_nor_leaves_the_current_stream(triton_backend):
    whole = stretches(SIZES, options(), device="cuda")
    expected_one, late = clones(whole), clones(whole)
    skip = torch.tensor(False, device="cuda")
    triton_backend.step(expected_one, skip)  # compiles
    triton_backend.update(expected_one, triton_backend.squared_norms(expected_one), skip)
    late = late._replace(grads=[torch.full_like(g, float("nan")) for g in whole.grads])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with no_waiting(), torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # what comes after it on this stream comes late
        for grad, number in zip(late.grads, whole.grads, strict=True):
            grad.copy_(number)
        triton_backend.step(late, skip)
        triton_backend.update(late, triton_backend.squared_norms(late), skip)
        assert not stream.query()
    stream.synchronize()
    assert same(expected_one, late)


def test_more_elements_than_32_bits_count(triton_backend):
    """All are alike, so that each must become what the last one does: p = v = 1 and g = 2, ratio η · ‖p‖ / ‖g‖."""
    num = 2**31 + 12345
    if torch.cuda.mem_get_info()[0] < 3.2 * 4 * num:
        pytest.skip("needs 28 GB of GPU memory")
    whole = stretches([0], options(weight_decay=0.0), device="cuda")
    p, g, v = (torch.full((num,), value, device="cuda") for value in (1.0, 2.0, 1.0))
    triton_backend.step(whole._replace(params=[p], grads=[g], buffers=[v]), None)
    # v = 0.9 · 1 + 0.7 · (0.02 · 1 / 2) · 2 = 0.914, and p = 1 − v
    for tensor, value in ((v, 0.914), (p, 0.086)):
        low, high = torch.aminmax(tensor)
        assert low.item() == pytest.approx(value, abs=1e-6)
        assert high.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_the_optimizer_on_a_network_in_channels_last(form, backend):
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 41, 3), nn.BatchNorm2d(41), nn.Conv2d(41, 17, 3))
        model = model.cuda().to(memory_format=torch.channels_last)
        optimizer = LARS(model.parameters(), lr=0.5, momentum=0.9, form=form, nesterov=True, backend=name)
        for _ in range(3):
            for param in model.parameters():
                param.grad = torch.randn_like(param)
            optimizer.step()
        results.append([param.detach() for param in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_it_agrees_with_the_loop_in_torch_on_resnet50_s_tensors(triton_backend):
    from model.resnet import EncoderConfig, ResNet

    params = [param.detach().cuda() for param in ResNet(EncoderConfig(depth=50)).parameters()]
    whole = stretches([1] * len(params), options())
    grads = [torch.randn_like(param) for param in params]
    buffers = [torch.zeros_like(param) for param in params]
    ours = whole._replace(params=params, grads=grads, buffers=buffers)
    theirs = clones(ours)
    for _ in range(3):
        triton_backend.step(ours, None)
        lars_loop.step(theirs, None)
    for tensor, other in zip(ours.params + ours.buffers, theirs.params + theirs.buffers, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
