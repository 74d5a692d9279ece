"""Small file systems of a test's own, which can be filled and made read-only."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small(where: Path, size: str) -> Iterator[Path]:
    """A tmpfs of a size at a directory; skips the test where nothing may be mounted."""
    where.mkdir(parents=True, exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(where)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def fill(where: Path) -> Path:
    """Take all the space of a file system; the file that has it."""
    path = where / "filling"
    with path.open("ab", buffering=0) as file:
        for block in (1 << 16, 1 << 12, 1):
            while _written(file.fileno(), block):
                pass
    return path


def _written(fd: int, block: int) -> bool:
    try:
        return os.write(fd, b"x" * block) == block
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
