"""The Triton backend of LARS: in the interpreter against the reference in float64, and compiled for GPUs."""

import numpy as np
import pytest
import torch

from tests.native.triton_compilation import compile_launch
from tests.native.triton_interpreter import process
from tests.train.lars_stretches import (
    EVERY_OPTION,
    FORMS,
    SIZES,
    cut,
    expected,
    norms,
    options,
    some,
    stretches,
)
from train.optim import lars_triton
from train.optim.lars_triton_kernels import ROW

# p, g and v are of order 1, and each of the handful of float32 operations on them rounds by 2⁻²⁴ of that.
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}
# The interpreter truncates to bfloat16, a GPU rounds.
SIXTEEN_BITS = {torch.float16: 2**-11, torch.bfloat16: 2**-7}


def interpreted(function, *arguments, **keywords):
    return process().submit(function, *arguments, **keywords).result()


def _arrays(whole):
    return [[tensor.double().numpy() for tensor in tensors] for tensors in (whole.params, whole.buffers)]


def _step(making, skip=None, steps=1):
    whole = stretches(**making)
    for _ in range(steps):
        lars_triton.step(whole, None if skip is None else torch.tensor(skip))
    return _arrays(whole)


def check(making, rounding=ROUNDING, step=_step):
    """Hold a step against the reference."""
    for ours, exact in zip(interpreted(step, making), expected(stretches(**making)), strict=True):
        for array, tensor in zip(ours, exact, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), tensor, **rounding)


def same(first, second):
    return all(np.array_equal(a, b) for kind in zip(first, second, strict=True) for a, b in zip(*kind, strict=True))


@pytest.mark.parametrize("each", EVERY_OPTION, ids=lambda o: f"{o.form}-{o.nesterov}-{o.adapt}")
def test_every_form_on_every_size(each):
    check({"sizes": SIZES, "options": each})


def test_stretches_of_different_options_in_one_step():
    each = [o._replace(lr=0.1 * (i + 1), momentum=0.9 - 0.05 * i) for i, o in enumerate(EVERY_OPTION)]
    check({"sizes": [1271] * len(each), "options": each})


def _step_by_rates_in_memory(making):
    whole = stretches(**making)
    each = {id(o): o._replace(lr=torch.tensor(o.lr)) for o in whole.options}
    lars_triton.step(whole._replace(options=[each[id(o)] for o in whole.options]), None)
    return _arrays(whole)


def test_a_rate_that_lies_in_memory_is_read_there():
    """As a CUDA graph needs it; each group's its own."""
    each = [o._replace(lr=0.1 * (i + 1)) for i, o in enumerate(EVERY_OPTION)]
    check({"sizes": [1271] * len(each), "options": each}, step=_step_by_rates_in_memory)


@pytest.mark.parametrize("lr", [torch.ones(2), torch.ones(1, dtype=torch.float64)])
def test_a_rate_in_memory_is_one_float32(lr):
    with pytest.raises(ValueError, match=r"^`lr` must be a number or one float32 on cpu, got "):
        lars_triton.step_launches(stretches((41,), options(lr=lr)), None)


@pytest.mark.parametrize("offsets", [(1, 1, 1), (0, 3, 0), (2, 0, 1)])
def test_stretches_start_anywhere(offsets):
    check({"sizes": (1, 41, 2049, 8193), "options": options("non_classic"), "offsets": offsets})


def _step_between_guards(making, size):
    whole = stretches(**making)
    inside = whole._replace(
        params=[p[5:][:size] for p in whole.params],
        grads=[g[5:][:size] for g in whole.grads],
        buffers=[v[5:][:size] for v in whole.buffers],
    )
    lars_triton.step(inside, None)
    return _arrays(whole)


@pytest.mark.parametrize("size", [1, 2048, 8195])
def test_nothing_else_is_written(size):
    making = {"sizes": [size + 12], "options": options()}
    before = _arrays(stretches(**making))
    for (old,), (new,) in zip(before, interpreted(_step_between_guards, making, size), strict=True):
        changed = np.flatnonzero(old != new)
        assert changed.min() == 5
        assert changed.max() == 5 + size - 1


@pytest.mark.parametrize("zeros", ["p", "g", "pg", "gv", "pgv"])
@pytest.mark.parametrize("form", FORMS)
def test_norms_that_are_zero(form, zeros):
    check({"sizes": (41, 8193), "options": options(form), "zeros": zeros})
    check({"sizes": (41,), "options": options(form, weight_decay=0.0, nesterov=True), "zeros": zeros})


@pytest.mark.parametrize(("params", "grads"), [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)])
def test_gradients_in_16_bits(params, grads):
    check({"sizes": (1, 401, 8193), "options": options(), "params": params, "grads": grads})


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_parameters_in_16_bits(dtype):
    rounding = {"rtol": SIXTEEN_BITS[dtype], "atol": 1e-6}
    check({"sizes": (1, 401, 8193), "options": options(), "params": dtype, "grads": dtype}, rounding)


def _step_of_both(making):
    """Half of the gradients in bfloat16, between the others."""
    whole = stretches(**making)
    for i in range(1, len(whole.grads), 2):
        whole.grads[i] = whole.grads[i].bfloat16()
    lars_triton.step(whole, None)
    return _arrays(whole)


def test_several_types_in_one_step():
    making = {"sizes": (401, 9000, 8193, 41), "options": options()}
    whole = stretches(**making)
    for i in (1, 3):
        whole.grads[i] = whole.grads[i].bfloat16()
    for ours, exact in zip(interpreted(_step_of_both, making), expected(whole), strict=True):
        for array, tensor in zip(ours, exact, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), tensor, **ROUNDING)


def _step_in_channels_last(shape, each):
    whole = _channels_last(shape, each)
    lars_triton.step(whole, None)
    assert whole.params[0].is_contiguous(memory_format=torch.channels_last)
    return _arrays(whole)


def _channels_last(shape, each):
    whole = stretches([int(np.prod(shape))], each)
    columns = [[t.view(shape).to(memory_format=torch.channels_last) for t in column] for column in whole[:3]]
    return whole._replace(params=columns[0], grads=columns[1], buffers=columns[2])


def test_weights_in_channels_last():
    arguments = (41, 17, 3, 3), options("larc", nesterov=True)
    for (ours,), (exact,) in zip(
        interpreted(_step_in_channels_last, *arguments), expected(_channels_last(*arguments)), strict=True
    ):
        torch.testing.assert_close(torch.from_numpy(ours), exact, **ROUNDING)


def test_a_stretch_without_elements():
    check({"sizes": (41, 0, 8193, 0), "options": options()})


def _step_in_parts(making, num_parts, keep, skip=None):
    """As on two ranks, one of which owns the parts `keep`, whose sums are added up in between."""
    whole = stretches(**making)
    parts = cut(whole, num_parts)
    ranks = [some(parts, keep), some(parts, [i for i in range(len(parts.params)) if i not in keep])]
    sums = [lars_triton.squared_norms(rank) for rank in ranks]
    for rank in ranks:
        lars_triton.update(rank, sums[0] + sums[1], skip)
    return _arrays(whole), [part.numpy() for part in sums]


@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_are_shared_out(form):
    making = {"sizes": (41, 24583, 8192), "options": options(form, nesterov=True)}
    ours, sums = interpreted(_step_in_parts, making, 3, [0, 1, 3])  # of the third tensor nothing
    whole = stretches(**making)
    assert sums[0].shape == (3, 2)
    assert sums[0].dtype == np.float32
    assert (sums[0][2] == 0).all()
    torch.testing.assert_close(torch.from_numpy(sums[0] + sums[1]).double(), norms(whole), rtol=1e-6, atol=0)
    for arrays, tensors in zip(ours, expected(whole), strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), tensor, **ROUNDING)


def _update_given(making, sums):
    whole = stretches(**making)
    lars_triton.update(whole, torch.from_numpy(sums), None)
    return _arrays(whole)


@pytest.mark.parametrize("form", FORMS)
def test_norms_of_what_is_not_adapted_may_be_anything_finite(form):
    making = {"sizes": (41, 8193), "options": [options(form), options(form, adapt=False)]}
    ours, sums = interpreted(_step_in_parts, making, 2, [0, 2])
    assert all(np.isfinite(part).all() for part in sums)
    given = (sums[0] + sums[1]) + np.float32([[0, 0], [3, 7]])
    assert same(interpreted(_update_given, making, given), ours)
    for arrays, tensors in zip(ours, expected(stretches(**making)), strict=True):
        for array, tensor in zip(arrays, tensors, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), tensor, **ROUNDING)


def test_a_skipped_step_changes_nothing():
    making = {"sizes": (41, 8193), "options": options()}
    assert same(interpreted(_step, making, skip=True), _arrays(stretches(**making)))
    assert same(interpreted(_step, making, skip=False), interpreted(_step, making))


def _skip_after_infinity():
    whole = stretches((41, 8193), options())
    whole.grads[1][8000] = float("inf")
    sums = lars_triton.squared_norms(whole)
    lars_triton.update(whole, sums, ~torch.isfinite(sums).all())
    return _arrays(whole)


def test_a_step_of_infinite_norm_can_be_skipped_without_being_looked_at():
    assert same(interpreted(_skip_after_infinity), _arrays(stretches((41, 8193), options())))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time(form):
    making = {"sizes": SIZES, "options": options(form)}
    assert same(interpreted(_step, making, steps=2), interpreted(_step, making, steps=2))


def _step_alone(making, index):
    whole = stretches(**making)
    alone = some(whole, [index])._replace(tensors=[0], num_tensors=1)
    lars_triton.step(alone, None)
    return _arrays(alone)


def test_a_tensor_alone_is_bit_equal_to_itself_among_others():
    making = {"sizes": (401, 24583, 41), "options": options()}
    params, buffers = interpreted(_step, making)
    assert same(interpreted(_step_alone, making, 1), [[params[1]], [buffers[1]]])


def test_rates_and_counts_lead_to_no_other_kernel():
    """A launch is compiled for its constants, and for whether addresses are multiples of 16."""
    kinds = set()
    for sizes, lr in (((41,), 0.1), ((1, 401, 9000), 1.0), ((8193,) * 5, 0.0)):
        whole = stretches(sizes, options(lr=lr))
        launches, total = lars_triton.norms_launches(whole)
        launches += lars_triton.step_launches(whole, None) + lars_triton.update_launches(whole, total, None)
        for launch in launches:
            aligned = tuple(argument.data_ptr() % 16 == 0 for argument in launch.arguments)
            kinds.add((launch.kernel.__name__, aligned, str(launch.constants)))
    assert len(kinds) == 3


def test_the_table_of_addresses():
    whole = stretches((41, 20000, 8192), [options(), options(), options("larc", adapt=False, lr=0.3)])
    table = lars_triton.send_table(whole, whole=False)
    rows = table.rows.numpy().view(ROW)
    assert rows["param"].tolist() == [p.data_ptr() for p in whole.params]
    assert rows["numel"].tolist() == [41, 20000, 8192]
    assert rows["first_chunk"].tolist() == [0, 1, 4]
    assert rows["num_norms"].tolist() == [1, 3, 1]
    assert rows["lr"].tolist() == [np.float32(0.7), np.float32(0.7), np.float32(0.3)]
    assert table.ends.tolist() == [0, 1, 4, 5]
    assert table.num_chunks == 5
    assert [part.tolist() for part, _ in table.chunks] == [[[0, 0], [1, 1], [1, 2], [1, 3], [2, 4]]]


@pytest.mark.parametrize(
    ("params", "grads", "message"),
    [
        (torch.float64, torch.float64, r"^`optim.backend` triton needs parameters in .*, got torch.float64; set it to"),
        (torch.float32, torch.float64, r"^`optim.backend` triton needs gradients in .*, got torch.float64; set it to"),
    ],
)
def test_a_type_that_is_not_served_is_named(params, grads, message):
    with pytest.raises(ValueError, match=message):
        lars_triton.step(stretches((3, 5), options(), params=params, grads=grads), None)


def compile_all(form, params, grads, capability):
    whole = stretches((20000,), options(form), params=params, grads=grads)
    launches, total = lars_triton.norms_launches(whole)
    launches += lars_triton.update_launches(whole, total, None)
    launches += lars_triton.update_launches(whole, total, torch.tensor(False))
    every = [compile_launch(launch, capability) for launch in launches]
    for compiled in every:
        print(f"{compiled.name:20} sm_{capability} {compiled.registers:4} registers {compiled.shared_bytes:6} B shared")
        assert compiled.local_bytes == 0, f"{compiled.name} spills on sm_{capability}"
        assert compiled.shared_bytes <= 8192  # none in float32; where types differ, values change threads
    return every


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["classic", "non_classic"])
@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16])
def test_compiled_for_a_gpu(grads, form, capability):
    sums, _, *updates = compile_all(form, torch.float32, grads, capability)
    # 256 threads read 16 bytes each at a time: of 2048 elements, a tensor in float32 takes 2 loads, in bfloat16 one.
    tensors = 1 + (2 if grads == torch.float32 else 1) / 2
    assert sums.ptx.count("ld.global.v4.b32") == 2 * (tensors + (form == "non_classic"))
    for update in updates:
        assert update.ptx.count("ld.global.v4.b32") == 2 * (tensors + 1)
        assert update.ptx.count("st.global.v4.b32") == 4
        assert 5 * 256 * update.registers <= 65536  # so that five programs fit on a processor, for the memory's latency


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["classic", "non_classic"])
@pytest.mark.parametrize("params", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grads", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_for_a_gpu_for_every_type(params, grads, form, capability):
    compile_all(form, params, grads, capability)
