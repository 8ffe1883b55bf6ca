"""A small file system, which is soon full."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def small_disk(folder, mib):
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=False
    )
    if made.returncode:
        pytest.skip("a file system of a given size can only be made by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
