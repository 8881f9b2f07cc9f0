"""A process in which Triton's kernels run on the CPU, in its interpreter.

It must be chosen before triton is imported, hence a process of its own. Its conversion from float32 to bfloat16
truncates where a GPU rounds, and its `tl.dot` of bfloat16 multiplies bit patterns.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context

import pytest
import torch


def process():
    """Submit functions of a module to it; what they take and give is pickled."""
    if _release("triton") < (3, 9) and _release("numpy") >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.9 cannot count a loop with NumPy 2.4 or newer")
    return _start()


def _release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


@functools.cache
def _start():
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_choose_the_interpreter)


def _choose_the_interpreter():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
