"""What stands in one file, and where each value of it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from msgspec import Struct

from reconciler.core.errors import Diagnostic, Place

Path: TypeAlias = tuple[str | int, ...]


class Document(Struct, frozen=True):
    """One file's value, with the line and column (from 1) of every value and every key in it."""

    file: str
    value: object
    values: Mapping[Path, tuple[int, int]]
    keys: Mapping[Path, tuple[int, int]]

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Where the value (or its key) at `path` stands; the nearest thing around it if absent."""
        while True:
            found = (self.keys.get(path) if key else None) or self.values.get(path)
            if found:
                return Place(self.file, *found)
            if not path:
                return Place(self.file, 1, 1)
            path = path[:-1]


def parse(text: str, file: str) -> tuple[Document | None, list[Diagnostic]]:
    """One YAML document. Everything that is wrong with it comes back at once; nothing is raised."""
    from reconciler.core.yaml_reader import read  # late: YAML takes 8 ms to load

    return read(text, file)
