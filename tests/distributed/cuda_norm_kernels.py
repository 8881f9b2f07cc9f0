"""What the CUDA kernels behind torch's SyncBatchNorm compute, for a machine without a GPU.

`register()` gives this process CPU kernels for the five operators, which have none, from the definitions in torch's
`aten/src/ATen/native/cuda/Normalization.cuh`, the dtypes that they insist on included. So the code around them runs;
the kernels themselves run in tests/gpu.
"""

import torch

LIBRARY = []  # keeps the registration alive


def register():
    LIBRARY.append(torch.library.Library("aten", "IMPL"))
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        LIBRARY[0].impl(kernel.__name__, kernel, "CPU")


def batch_norm_stats(input, eps):
    check_dense(input)
    x = accumulated(input).transpose(0, 1).flatten(1)
    return x.mean(1), (x.var(1, unbiased=False) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts):
    assert counts.dtype == running_mean.dtype == running_var.dtype
    average, var_n, n = torch.zeros_like(mean[0]), torch.zeros_like(mean[0]), 0
    for m, s, count in zip(mean, invstd, counts, strict=True):
        factor = 1 / (n + count)
        var_n = var_n + (1 / s**2 - eps) * count + (average - m) ** 2 * n * count * factor
        average = n * factor * average + count * factor * m
        n = int(n + count)
    running_mean.lerp_(average, momentum)
    running_var.lerp_(var_n / (n - 1), momentum)
    return average, (var_n / n + eps).rsqrt()


def batch_norm_elemt(input, weight, bias, mean, invstd, eps):
    check_dense(input)
    check_parameters(input, weight, bias)
    y = (accumulated(input) - per_channel(mean, input)) * per_channel(invstd, input)
    y = y if weight is None else y * per_channel(weight, input)
    return (y if bias is None else y + per_channel(bias, input)).to(input.dtype)


def batch_norm_backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    check_dense(input)
    check_dense(grad_out)
    assert (input_g, weight_g, bias_g) == (True, False, False)
    dy = accumulated(grad_out)
    dy_xmu = dy * (accumulated(input) - per_channel(mean, input))
    sums = [t.transpose(0, 1).flatten(1).sum(1) for t in (dy, dy_xmu)]
    return *sums, torch.empty(0), torch.empty(0)


def batch_norm_backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    check_dense(input)
    check_dense(grad_out)
    check_parameters(input, weight)
    assert count.dtype == torch.int32
    total = count.sum()
    centred = accumulated(input) - per_channel(mean, input)
    projected = centred * per_channel(invstd**2 * sum_dy_xmu / total, input)
    scale = invstd if weight is None else invstd * weight
    return ((grad_out - per_channel(sum_dy / total, input) - projected) * per_channel(scale, input)).to(input.dtype)


def accumulated(x):
    return x if x.dtype == torch.float64 else x.float()


def per_channel(t, input):
    return t.view(-1, *[1] * (input.dim() - 2))


def check_dense(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    assert x.numel()
    assert x.is_contiguous() or x.is_contiguous(memory_format=formats[x.dim()])


def check_parameters(input, *parameters):
    for parameter in parameters:
        assert parameter is None or parameter.dtype in {input.dtype, accumulated(input).dtype}
