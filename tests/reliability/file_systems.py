"""Small file systems, mounted for a test and always unmounted; skipped by name where that is not permitted."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder, *options):
    """Mount something on a folder, by the words that `mount` takes before it."""
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(["mount", *options, folder], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"no permission to mount {' '.join(map(str, options))}: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # also while a process that a test lost is in it


def tmpfs(folder, size_kib):
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size_kib}k", "none")


def free_bytes(folder):
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def fill(folder, leave):
    """Take the room of a file system but for so many bytes; returns the file that does."""
    ballast = Path(folder, "ballast")
    with ballast.open("ab") as file:
        while (room := free_bytes(folder) - leave) > 0:
            file.write(bytes(min(room, 2**20)))
            file.flush()
    return ballast
