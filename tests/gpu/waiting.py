"""Where the host must not wait for the GPU."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting():
    """An operation that makes the host wait for the current device raises a RuntimeError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
