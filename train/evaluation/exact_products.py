"""Matrix products and convolutions with all the bits of their type, whatever the process has allowed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No TF32 (10 bits of 23), no bfloat16 in place of float32, no autocast, for as long as this lasts."""
    allowed, allowed_in_convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)
        torch.backends.cudnn.allow_tf32 = allowed_in_convolutions
