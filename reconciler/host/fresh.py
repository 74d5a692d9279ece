"""New files, all or none, and never over what is there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from reconciler.core.errors import HostError


class Exists(HostError):  # noqa: N818 a state, not a fault
    """Something has the name already."""


def write(files: Mapping[Path, str]) -> None:
    """Write new files, each whole and on the disk before any of them has its name.

    Raises Exists, which names all that is there, or HostError; then nothing was written, but for
    directories that were missing.
    """
    there = [path for path in files if os.path.lexists(path)]
    if there:
        raise _refused(there)
    parts: dict[Path, Path] = {}
    named: list[Path] = []
    path = Path()
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            parts[path] = part
            _write(part, text)
        for path, part in parts.items():
            os.link(part, path)  # fails where the name is taken meanwhile
            named.append(path)
    except OSError as error:
        for one in named:
            one.unlink()
        if isinstance(error, FileExistsError) and os.path.lexists(path):
            raise _refused([path]) from error
        raise HostError(f"cannot write {path}: {error.strerror}; nothing was written") from error
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()


def _refused(there: list[Path]) -> Exists:
    names = ", ".join(map(str, there))
    many = "are there already" if len(there) > 1 else "is there already"
    return Exists(f"cannot write: {names} {many}; nothing was written: name another place")


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # of one with our pid that was killed
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
