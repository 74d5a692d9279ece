"""Fixtures that tests of any kind may use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounts import Hung, Mounts, private


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    """What a test may mount; without the right to, it is skipped."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    try:
        private()
    except OSError as error:
        pytest.skip(f"no mounts of one's own here: {error}")
    with contextlib.ExitStack() as stack:
        yield Mounts(stack)


@pytest.fixture
def hangable(mounts: Mounts, tmp_path: Path) -> Mounts:
    """The same, where a mount can be made to hang."""
    try:
        Hung(tmp_path / "probe").end()
    except OSError as error:
        pytest.skip(f"no FUSE mounts here: {error}")
    return mounts
