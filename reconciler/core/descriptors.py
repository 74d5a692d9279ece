"""How many open files a daemon and its servers need."""

from __future__ import annotations

from typing import Final

IDLE_FILES: Final = 64
"""Descriptors of a daemon beside its exports. Measured: 16, with callbacks and looks some more."""
FILES: Final = 4
"""Descriptors that a daemon needs for an export: its socket and its pidfd, measured; and twice that
while it is started and asked."""
SERVER_FILES: Final = 64
"""Descriptors of one server: 9 at rest, 1 per client, some for its own work. Measured: 12."""


def files_for(exports: int) -> int:
    """How many open files a process must be allowed that keeps so many exports up."""
    return max(IDLE_FILES + FILES * exports, SERVER_FILES)


def more_files(exports: int) -> str:
    """What allows as many, with some to spare; a command, or a line of a unit."""
    files = 2 * files_for(exports)
    return f"LimitNOFILE={files} in the unit, or: ulimit -n {files}"
