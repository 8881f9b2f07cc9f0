"""Compiled kernels on disk that never outlive the code they were made from.

Numba's cache knows a kernel by its own file and closure alone. The functions that are compiled into it come from other
files, whose content is therefore put into its closure: an update never meets old machine code.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path


def source_hash(*modules: str) -> str:
    """SHA-256 over the source files of some modules, in the order given."""
    files = [importlib.import_module(module).__file__ for module in modules]
    return hashlib.sha256(b"".join(Path(str(file)).read_bytes() for file in files)).hexdigest()
