"""What has changed in a raw file since an earlier backup, by digests of its pieces.

A hypervisor notes what is written; nobody does of a file. So each backup leaves the digests of the
file's pieces beside it, under its change id, and the next one compares.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from areas import Area

PIECE: Final = 1 << 16
"""What is told apart. Bytes. Source: the granularity of QEMU's dirty bitmaps."""
KEPT: Final = 8
"""How many backups of a disk can be gone on from. Chosen."""


class RawFile:
    """A file that is read as a disk is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @contextmanager
    def opened(self) -> Iterator[RawFile]:
        """Itself, for who reads by several connections."""
        yield self

    def read(self, offset: int, length: int) -> bytes:
        """Read so many bytes; zeros behind its end."""
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset).ljust(length, b"\0")

    def digests(self) -> list[str]:
        """Digest every piece."""
        with self.path.open("rb") as file:
            pieces = iter(lambda: file.read(PIECE), b"")
            return [hashlib.blake2b(piece, digest_size=16).hexdigest() for piece in pieces]


def note(source: Path, change_id: str, digests: list[str]) -> None:
    """Leave the digests of a backup beside its source; the oldest of many go."""
    folder = _folder(source)
    folder.mkdir(exist_ok=True)
    fresh = folder / "being-written"
    fresh.write_text(json.dumps(digests))
    fresh.rename(_file(source, change_id))
    known = sorted(folder.glob("*.json"), key=lambda one: one.stat().st_mtime_ns)
    for old in known[:-KEPT]:
        old.unlink(missing_ok=True)


def changed(source: Path, change_id: str, digests: list[str]) -> tuple[Area, ...] | None:
    """Say what has changed since a backup; None: nothing is known of that one."""
    try:
        before = json.loads(_file(source, change_id).read_text())
    except FileNotFoundError:
        return None
    size = source.stat().st_size
    if len(before) != len(digests):
        return None  # it has another size, and every offset may be another
    return tuple(
        Area(number * PIECE, min(PIECE, size - number * PIECE))
        for number, (old, new) in enumerate(zip(before, digests, strict=True))
        if old != new
    )


def _folder(source: Path) -> Path:
    return source.with_suffix(".changes")


def _file(source: Path, change_id: str) -> Path:
    """A change id has a slash in it."""
    return (
        _folder(source) / f"{hashlib.blake2b(change_id.encode(), digest_size=12).hexdigest()}.json"
    )
