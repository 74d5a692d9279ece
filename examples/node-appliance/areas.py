"""Parts of a disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Area:
    """A part of a disk. Bytes."""

    offset: int
    length: int
