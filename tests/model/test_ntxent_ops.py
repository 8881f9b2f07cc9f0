"""NT-Xent's operators: `opcheck`, and the loss under torch.compile, with autograd and autocast, against eager calls."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.ntxent import fused, ops, tiled
from model.ntxent.loss import nt_xent
from tests.model.test_ntxent import gradients, projections
from tests.native.triton_interpreter import process

TWINVIEW = torch.ops.twinview
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def rows(num_images=9, dim=5, dtype=torch.float32):
    """Scaled rows of three blocks, as of three ranks."""
    z = torch.cat(projections(3 * num_images, dim, dtype)).detach()
    return torch.nn.functional.normalize(z) * 3.0


@pytest.mark.parametrize(
    ("backend", "dtype"), [("tiled", torch.float32), ("tiled", torch.float64), ("fused", torch.float32)]
)
@pytest.mark.parametrize("first", [0, 18, None])
def test_both_passes_are_operators(backend, dtype, first):
    columns = rows(dtype=dtype)
    own = columns[18:36] if first is None else columns[first : first + 18]
    lse = torch.linspace(2.0, 4.0, len(columns), dtype=dtype)
    own_lse = lse[18:36] if first is None else lse[first : first + 18]
    torch.library.opcheck(TWINVIEW.ntxent_scan, (own, columns, first, backend))
    torch.library.opcheck(TWINVIEW.ntxent_gradient, (own, columns, own_lse, lse, first, backend))
    walk = {"tiled": tiled, "fused": fused}[backend]
    for ours, theirs in zip(ops.scan(own, columns, first, backend), walk.scan(own, columns, first), strict=True):
        assert torch.equal(ours, theirs)
    ours = ops.gradient(own, columns, own_lse, lse, first, backend)
    assert torch.equal(ours, walk.gradient(own, columns, own_lse, lse, first))


def test_tritons_steps_are_operators():
    process().submit(_check_triton).result()


def _check_triton():
    """In the interpreter, where the kernels take CPU tensors."""
    from model.ntxent import triton_launch

    for dtype in (torch.float32, torch.float16):
        z1, z2 = (z.detach() for z in projections(9, 5, dtype))
        u, _, kept = triton_launch.to_rows(z1, z2, 0.1)
        lse, margin = torch.linspace(10.0, 12.0, len(u)), torch.linspace(-1.0, 1.0, len(u))
        sums = triton_launch.gradient(u, u, lse, lse, 0)
        torch.library.opcheck(TWINVIEW.ntxent_scan, (u, u, 0, "triton"))
        torch.library.opcheck(TWINVIEW.ntxent_gradient, (u, u, lse, lse, 0, "triton"))
        for learned in (None, torch.tensor(0.1)):
            torch.library.opcheck(TWINVIEW.ntxent_to_rows, (z1, z2, 0.1, learned))
            torch.library.opcheck(TWINVIEW.ntxent_to_input, (sums, *kept, margin, torch.tensor(2.0), 0.1, learned))
        operators = ops.Operators("triton")
        for tau in (0.1, torch.tensor(0.1)):
            by_operators, by_kernels = (
                steps.to_input(sums, u, kept, margin, torch.tensor(2.0), tau) for steps in (operators, triton_launch)
            )
            assert torch.equal(operators.to_rows(z1, z2, tau, True)[0], u)
            assert torch.equal(by_operators[0], by_kernels[0])
            assert by_operators[1] == by_kernels[1]


def loss(z1, z2, temperature, backend, normalize=True):
    return nt_xent(z1, z2, temperature=temperature, backend=backend, normalize=normalize)


def check_compiled(compiled, dtype, backend, temperature, num_images=41, normalize=True):
    """Hold a compiled loss against the eager one."""
    z1, z2 = projections(num_images, 16, dtype)
    inputs = (z1, z2, temperature) if isinstance(temperature, torch.Tensor) else (z1, z2)
    ours, theirs = (call(z1, z2, temperature, backend, normalize) for call in (compiled, loss))
    assert ours.loss.dtype == theirs.loss.dtype
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=1e-6)
    assert ours.contrastive_accuracy == theirs.contrastive_accuracy
    for gradient, expected in zip(
        gradients(ours.loss, *inputs, upstream=-2.5), gradients(theirs.loss, *inputs, upstream=-2.5), strict=True
    ):
        # Fused operations round less often; the gradient is rounded to the input's dtype at the end.
        torch.testing.assert_close(gradient, expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("backend", ["tiled", "fused", "auto", "reference"])
@pytest.mark.parametrize("learned", [False, True])
def test_traced_whole(backend, learned):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    temperature = torch.tensor(0.2, requires_grad=True) if learned else 0.2
    check_compiled(compiled, torch.float32, backend, temperature)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_traced_in_other_dtypes_without_normalisation(dtype):
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    check_compiled(compiled, dtype, "auto", 2.0, normalize=False)


@pytest.mark.skipif(TORCH < (2, 14), reason="torch before 2.14 cannot trace an autograd.Function of symbolic sizes")
def test_traced_for_any_number_of_images():
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for num_images in (41, 30, 7):
        check_compiled(compiled, torch.float32, "fused", 0.2, num_images)


def test_compiled_by_inductor():
    check_compiled(torch.compile(loss, fullgraph=True), torch.float32, "auto", torch.tensor(0.2, requires_grad=True))


def test_compiled_under_autocast_with_the_layer_before_it():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 8)
    x1, x2 = (x.detach() for x in projections(41, 16, torch.float32))

    def step(x1, x2):
        return nt_xent(layer(x1), layer(x2), temperature=0.2).loss

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = call(x1, x2)
        value.backward()
        results.append((value.detach(), layer.weight.grad.clone()))
    assert results[0][0].dtype == torch.float32
    # The layer's products are bfloat16, and the compiler orders its backward otherwise.
    torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=2**-8)


def test_compiled_code_calls_the_operators():
    called = []

    def backend(graph, _):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(lambda z1, z2: loss(z1, z2, 0.2, "fused").loss, fullgraph=True, backend=backend)(
        *(z.detach() for z in projections(5, 4, torch.float32))
    )
    assert sum("ntxent_scan" in name for name in called) == 1


class Called(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_eager_calls_do_not():
    with Called() as called:
        loss(*projections(5, 4, torch.float32), 0.2, "fused")
    assert called.names
    assert not [name for name in called.names if name.startswith("twinview")]
