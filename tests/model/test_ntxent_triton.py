"""NT-Xent's GPU kernels: in Triton's interpreter against the formula in float64, and compiled for GPUs not at hand."""

import functools
import math

import numpy as np
import pytest
import torch

from model.ntxent import tiled
from model.ntxent.loss import nt_xent
from model.ntxent.reference import nt_xent_reference
from tests.model.test_ntxent import gradients, projections
from tests.native.triton_compilation import SHARED_MEMORY, compile_launch
from tests.native.triton_interpreter import process

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the gradient, relative to all of it. fp16 rows and weights are rounded by 2⁻¹² of themselves: 2e-4 to 1e-3, or 2e-3
# where there are few rows and their terms cancel. bf16's own rounding comes on top, 2⁻⁸ since the interpreter
# truncates. fp32 rows are rounded by 2⁻²³, and sums by as much a few times: 1e-7 to 4e-7.
GRADIENT = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3 + 2**-8}
# Of 1/τ, the largest similarity; an fp16 row is off by 2⁻¹².
SIMILARITY = {torch.float32: 4 * 2**-23, torch.float16: 2**-9, torch.bfloat16: 2**-9}
LAYOUTS = {
    "contiguous": lambda z: z,
    "every second row": lambda z: z.repeat_interleave(2, dim=0)[::2],
    "every third column": lambda z: z.repeat_interleave(3, dim=1)[:, ::3],
    "transposed": lambda z: z.T.contiguous().T,
    "reversed pair": lambda z: torch.stack((z, z), dim=-1)[..., 0],
}


def in_interpreter(function):
    """Calls a function of this module in a process where kernels run in the interpreter."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return process().submit(_call, function.__name__, args, kwargs).result()

    call.function = function
    return call


def _call(name, args, kwargs):
    return globals()[name].function(*args, **kwargs)


@in_interpreter
def kernels(z1, z2, dtype, temperature, upstream=1.0, learned=False, layout="contiguous", processors=132):
    """Loss, accuracy, dL/dz and dL/dτ of z1, z2 (NumPy, float64) in `dtype`; NumPy, float64."""
    from model.ntxent import triton_launch
    from model.ntxent.autograd import NTXentFunction, Settings

    triton_launch.PROCESSORS = processors
    z1, z2 = (LAYOUTS[layout](torch.from_numpy(z).to(dtype)).requires_grad_() for z in (z1, z2))
    tau = torch.tensor(temperature, requires_grad=True) if learned else temperature
    loss, accuracy = NTXentFunction.apply(z1, z2, tau, Settings(True, None, "all_gather", triton_launch, triton_launch))
    assert loss.dtype == torch.float32
    z1_grad, z2_grad, *rest = gradients(loss, z1, z2, *([tau] if learned else []), upstream=upstream)
    assert z1_grad.dtype == dtype
    grad = torch.cat((z1_grad, z2_grad)).double().numpy()
    return loss.item(), accuracy.item(), grad, rest[0].item() if learned else None


@in_interpreter
def passes(z1, z2, dtype, temperature, first, num_blocks):
    """Both passes of one rank's rows against columns, and the stored rows; NumPy."""
    from model.ntxent import triton_launch

    views = [torch.from_numpy(z).to(dtype).chunk(num_blocks) for z in (z1, z2)]
    blocks = [triton_launch.to_rows(*pair, temperature)[0] for pair in zip(*views, strict=True)]
    columns = torch.cat(blocks)
    rows = blocks[1]
    if first is None:
        columns = torch.cat((blocks[0], *blocks[2:]))
    lse, hardest = triton_launch.scan(rows, columns, first)
    column_lse = torch.linspace(8.0, 12.0, len(columns))
    row_lse = torch.linspace(8.0, 12.0, len(rows)) if first is None else column_lse[first : first + len(rows)]
    sums = triton_launch.gradient(rows, columns, row_lse, column_lse, first)
    return [tensor.double().numpy() for tensor in (rows, columns, lse, hardest, row_lse, column_lse, sums)]


def check(num_images, dim, dtype, temperature, upstream=-2.5, z=None, **options):
    """Hold the kernels against the formula; returns what they gave."""
    z1, z2 = z or projections(num_images, dim, torch.float64)
    z1, z2 = (view.detach().to(dtype).double().requires_grad_() for view in (z1, z2))
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    loss, accuracy, grad, tau_grad = ours = kernels(
        z1.detach().numpy(), z2.detach().numpy(), dtype, temperature, upstream, **options
    )
    expected, expected_accuracy = nt_xent_reference(z1, z2, temperature=tau, normalize=True)
    *expected_grad, expected_tau = gradients(expected, z1, z2, tau, upstream=upstream)
    expected_grad = torch.cat(expected_grad).numpy()
    assert loss == pytest.approx(expected.item(), abs=SIMILARITY[dtype] / temperature + 1e-6)
    assert accuracy == pytest.approx(expected_accuracy.item(), abs=1e-6 if dtype == torch.float32 else 2 / num_images)
    error = np.linalg.norm(grad - expected_grad)
    # An error of s, which is 1/τ at most, is one of e^s; and where positives stand out, little is left of what cancels.
    assert error <= GRADIENT[dtype] * max(1, 0.1 / temperature) ** 2 * np.linalg.norm(expected_grad)
    if tau_grad is not None:
        assert tau_grad == pytest.approx(expected_tau.item(), rel=10 * GRADIENT[dtype])
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_images", "dim"), [(1, 3), (2, 17), (41, 41), (150, 128)])
def test_loss_and_gradient_are_the_formulas(num_images, dim, dtype):
    check(num_images, dim, dtype, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.02, 1.0, 20.0])
@pytest.mark.parametrize(("num_images", "dim"), [(401, 41), (64, 64), (41, 401), (20, 1271)])
def test_other_temperatures(num_images, dim, temperature):
    check(num_images, dim, torch.float32, temperature, learned=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_images", "dim"), [(401, 128), (1271, 8), (20, 2048)])
def test_other_sizes(num_images, dim, dtype):
    check(num_images, dim, dtype, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [200, 300])
def test_rows_that_are_walked_in_chunks(dim, dtype):
    check(20, dim, dtype, 0.2, processors=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_a_learned_temperature_is_read_on_the_device_and_has_its_gradient(temperature, dtype):
    loss, accuracy, grad, _ = check(41, 16, dtype, temperature, learned=True)
    fixed = check(41, 16, dtype, temperature)
    assert (loss, accuracy) == fixed[:2]
    assert (grad == fixed[2]).all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_inputs_may_lie_in_any_way(layout):
    expected = check(41, 17, torch.float32, 0.1)
    ours = check(41, 17, torch.float32, 0.1, layout=layout)
    assert ours[0] == expected[0]
    assert (ours[2] == expected[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stretches_of_any_number_agree_and_repeat_bit_for_bit(dtype):
    few, many = (check(150, 16, dtype, 0.1, processors=processors) for processors in (1, 132))
    assert many[0] == pytest.approx(few[0], rel=1e-6)
    assert np.linalg.norm(many[2] - few[2]) < 0.3 * GRADIENT[dtype] * np.linalg.norm(few[2])
    assert (check(150, 16, dtype, 0.1, processors=132)[2] == many[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exponents_too_far_apart_for_one_exponential(dtype):
    """One cluster at s = 1/τ, and rows far from all: their log-sum-exps differ by 200, and fp32 holds e^88."""
    z1, z2 = torch.eye(6, 16, dtype=torch.float64), torch.eye(6, 16, dtype=torch.float64).roll(1, 0)
    z1[3:], z2[3:] = z1[0], z2[0]
    z1[3:] += 0.01 * torch.arange(3)[:, None] * z1[1]
    check(6, 16, dtype, 0.005, z=(z1, z2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # fp16 cannot hold a gradient of 1e6
def test_rows_of_length_zero_and_rows_that_are_shorter_than_the_bound(dtype):
    z1, z2 = (z.detach() for z in projections(5, 4))
    z1[0], z2[3] = 0, 1e-8 * z2[3]
    check(5, 4, dtype, 0.5, z=(z1, z2))


def test_a_collapsed_encoder_earns_no_accuracy():
    z = torch.randn(1, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(70, 41).numpy()
    for dtype in (torch.float32, torch.float16):
        loss, accuracy, _, _ = kernels(z, z, dtype, 0.1)
        assert loss == pytest.approx(math.log(139), rel=1e-5)
        assert accuracy == 0.0


def test_what_is_not_a_number_shows_in_the_loss():
    z1, z2 = (z.detach().numpy() for z in projections(5, 4))
    z2[3, 1] = math.nan
    assert math.isnan(kernels(z1, z2, torch.float32, 0.1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [58, None])
def test_rows_of_other_ranks_are_negatives_all(first, dtype):
    """Three ranks of 29 images; the middle one's rows, against all columns, and against those of the others alone."""
    z1, z2 = (z.detach().numpy() for z in projections(3 * 29, 33))
    rows, columns, lse, hardest, row_lse, column_lse, sums = map(
        torch.from_numpy, passes(z1, z2, dtype, 0.1, first, num_blocks=3)
    )
    u, v = ((x.sum(1) / (16 * math.log2(math.e) ** 0.5)) for x in (rows, columns))  # what the stored rows stand for
    expected_lse, expected_hardest = tiled.scan(u, v, first)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=4e-6)
    torch.testing.assert_close(hardest, expected_hardest, rtol=0, atol=4e-6)
    expected = tiled.gradient(u, v, row_lse, column_lse, first)
    error = (sums.sum(0) - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 2**-11)  # weights of fp16


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float32, "'triton' computes in fp16 or fp32 on a CUDA device, got torch.float32 on cpu; use 'tiled'"),
        (torch.float64, "backend 'triton' .* got torch.float64 on cpu; use 'tiled'"),
    ],
)
def test_what_it_does_not_serve_is_refused(dtype, message):
    with pytest.raises(ValueError, match=message):
        nt_xent(*projections(3, 2, dtype), temperature=0.1, backend="triton")


SIZES = {
    "n4096_d128": (4096, 128),
    "n4096_d64": (4096, 64),
    "n4096_d256": (4096, 256),
    "odd_n1271_d41": (1271, 41),
    "odd_n401_d401": (401, 401),
    "n1024_d2048": (1024, 2048),
}


def launches(num_images, dim, dtype, learned=False):
    """All that a step starts."""
    from model.ntxent import triton_launch

    z1, z2 = torch.empty(2, num_images, dim, dtype=dtype)
    tau = torch.empty(()) if learned else 0.1
    rows = torch.empty(triton_launch.rows_shape(z1), dtype=torch.float16)
    vectors = [torch.empty(len(rows)) for _ in range(3)]
    sums = torch.empty(triton_launch.gradient_shape(rows, rows))
    grad = torch.empty(len(rows), dim, dtype=dtype)
    yield triton_launch.rows_launch(z1, z2, tau, rows, vectors[0])
    yield from triton_launch.scan_launches(rows, rows, 0, *vectors[1:])
    yield from triton_launch.gradient_launches(rows, rows, *vectors[:2], 0, sums)
    yield triton_launch.chain_launch(z1, z2, tau, sums, vectors[0], torch.empty(()), grad, vectors[1])


def check_compiled(launch, capability):
    compiled = compile_launch(launch, capability)
    print(f"{compiled.name:16} sm_{capability} {compiled.registers:4} registers {compiled.shared_bytes:7} B shared")
    assert compiled.local_bytes == 0, f"{compiled.name} spills on sm_{capability}: {launch.constants}"
    # GPUs of capability 8.6 and 8.9 run what is compiled for 8.0, with 99 KiB.
    assert compiled.shared_bytes <= min(SHARED_MEMORY[capability], 99 * 1024 if capability == 80 else math.inf)
    walks = compiled.name in ("scan_kernel", "gradient_kernel")
    product = "wgmma.mma_async.sync.aligned" if capability == 90 else "mma.sync.aligned"
    assert (f"{product}.m" in compiled.ptx and ".f32.f16.f16" in compiled.ptx) == walks  # on tensor cores
    assert not walks or "div.full" not in compiled.ptx
    return compiled


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", ["n4096_d128", "odd_n401_d401"])
def test_every_kernel_compiles_without_spills(size, dtype, capability):
    names = [check_compiled(launch, capability).name for launch in launches(*SIZES[size], dtype)]
    assert names == [f"{name}_kernel" for name in ("rows", "scan", "merge", "survey", "gradient", "chain")]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_other_sizes_compile_without_spills(size, dtype, learned, capability):
    for launch in launches(*SIZES[size], dtype, learned):
        check_compiled(launch, capability)
