"""Requests for runs: a file per VM in a directory of the state, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from reconciler.core.errors import HostError


def prepare(directory: Path) -> None:
    """Make the directory, if it is not there. Raises HostError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make the directory {directory}: {error.strerror}; run as a user who may "
            "write there, or set `state:` in the config (or RECONCILER_STATE)",
            "Storage",
        ) from error


def path(directory: Path, vm: str) -> Path:
    """The file of a VM's request."""
    return directory / f"{vm}.yaml"


def write(directory: Path, texts: Mapping[str, str]) -> None:
    """Put each VM's text where its request is, over an older one. Raises HostError.

    All are on the disk under other names before the first takes its own, so a disk that fills up
    changes nothing, and a file is never torn. The caller holds a lock: the other names are always
    the same, and what a crash left of them is written over.
    """
    written: dict[Path, Path] = {}
    try:
        for vm, text in texts.items():
            temporary = directory / f".{vm}.writing"
            written[temporary] = path(directory, vm)
            _write(temporary, text)
        for temporary, final in written.items():
            os.replace(temporary, final)
        _sync(directory)
    except OSError as error:
        for temporary in written:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise HostError(
            f"cannot write the request {error.filename or directory}: {error.strerror}; see to the "
            f"space and the rights: df {directory}",
            "Storage",
        ) from error


def _write(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        data = text.encode()
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
