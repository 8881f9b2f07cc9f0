"""Where a program reads on the host what a device has computed, or makes shapes depend on it.

On a GPU such a read makes the host wait, and neither it nor such a shape can be recorded in a CUDA graph. On a CPU
nothing waits, so that they can be watched for there: operators by their dispatch, methods of tensors by their call.
"""

import sys

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING_METHODS = {
    getattr(torch.Tensor, name): name
    for name in ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
}
READING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
PACKAGES = ("model", "train", "deepspeed", "tests")


class HostReads(TorchDispatchMode):
    """`with HostReads() as reads`: `reads.found` is a set of (what, module.function that did it)."""

    def __init__(self):
        super().__init__()
        self.found = set()
        self._methods = _Methods(self.found)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        by_mask = name.split(".")[0] in INDEXING and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if name in READING_OPERATORS or name.split(".")[0] in READING_OPERATORS or by_mask:
            self.found.add((name, _caller()))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING_METHODS:
            self._found.add((READING_METHODS[func], _caller()))
        return func(*args, **(kwargs or {}))


def _caller():
    """The innermost function of a package that is looked after; "torch" where there is none, as in a backward."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in PACKAGES and module != __name__:
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
