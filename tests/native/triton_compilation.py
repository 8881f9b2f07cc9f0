"""Compile Triton kernels for GPUs that are not there, and read what became of them.

A kernel is compiled with the specialisations that Triton would choose for the same arguments at run time: integers
that are 1 or divisible by 16, pointers that are aligned.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""By compute capability: bytes of shared memory that a program can have (CUDA C++ programming guide, appendix)."""


class Compiled(NamedTuple):
    """What one kernel takes on one GPU."""

    name: str
    registers: int
    local_bytes: int
    """Of a thread, outside the registers: what was spilled."""
    shared_bytes: int
    ptx: str


def compile_launch(launch, capability):
    """Compile a launch's kernel for a compute capability, such as 90.

    Args:
        launch: has `kernel`, `arguments`, `constants` and `options`; tensors are of any device.
        capability: 80 or 90.
    """
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[names.index(name)]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            specialized = not launch.kernel.params[i].do_not_specialize
            aligned = specialized and value % 16 == 0
            if specialized and value == 1:
                signature[name], constants[name] = "constexpr", 1
                continue
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, local_bytes = _resources(compiled.asm["cubin"])
    return Compiled(launch.kernel.__name__, registers, local_bytes, compiled.metadata.shared, compiled.asm["ptx"])


def _resources(cubin):
    """Registers of a thread, and its bytes in local memory, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return figures["REG"], figures["STACK"] + figures["LOCAL"]
