"""Our mark in `--description`, and argv ↔ Export both ways.

argv is readable by any later process, so the mark makes a server ours without any file.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from reconciler.core.desired import Export
from reconciler.core.settings import QemuNbd
from reconciler.core.units import Bytes, Port

PREFIX: Final = "nbd-reconciler/1"
"""First word of every mark; the number changes when its fields do."""
READER: Final = "nbd-reconciler-reader/1"
"""First word of what a server says that a restore test has for itself: it is no export."""
_NAME: Final = r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})"
_NUMBER: Final = r"([0-9]{1,10})"
_MARK: Final = re.compile(
    f"{PREFIX} hub={_NAME} vm={_NAME} disk={_NUMBER} run={_NAME} attempt={_NUMBER} port={_NUMBER}"
)
ENTER: Final = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"'
"""The small step that knows its own pid, as socket activation wants; it carries the mark too."""


class Mark(Struct, frozen=True):
    """Whose server this is, and for what."""

    hub: str
    vm: str
    disk: int
    run: str
    attempt: int
    port: Port

    def __str__(self) -> str:
        return (
            f"{PREFIX} hub={self.hub} vm={self.vm} disk={self.disk} run={self.run} "
            f"attempt={self.attempt} port={self.port}"
        )

    @property
    def key(self) -> tuple[str, int, str, int]:
        return (self.vm, self.disk, self.run, self.attempt)

    @classmethod
    def parse(cls, text: str) -> Mark | None:
        """The mark in a description, or None if it is not one of ours."""
        found = _MARK.fullmatch(text)
        if found is None:
            return None
        hub, vm, disk, run, attempt, port = found.groups()
        return cls(hub, vm, int(disk), run, int(attempt), int(port))


def argv(export: Export, port: Port, hub: str, options: QemuNbd) -> tuple[str, ...]:
    """The command line of an export's server. The socket comes by activation, so no --port."""
    mark = Mark(hub, export.vm, export.key, export.run, export.attempt, port)
    line = [
        posixpath.basename(options.binary),
        "--persistent",
        *("--shared", str(options.shared)),
        *("--format", "qcow2"),
        *("--export-name", export.name),
        *("--description", str(mark)),
    ]
    if export.read_only:
        line.append("--read-only")
    for name in ("cache", "aio", "discard", "detect_zeroes"):
        value = getattr(options, name)
        if value is not None:
            line += [f"--{name.replace('_', '-')}", value]
    return (*line, export.image)


class Served(Struct, frozen=True):
    """What a qemu-nbd's argv says that it serves."""

    argv: tuple[str, ...]
    mark: Mark | None
    starting: bool
    """Still the small step before exec."""
    image: str | None
    port: Port | None


_SHORT: Final = {"-D": "--description", "-p": "--port", "-x": "--export-name"}
_VALUED: Final = frozenset(
    {
        "--description",
        "--port",
        "--export-name",
        "--shared",
        "--format",
        "--cache",
        "--aio",
        "--discard",
        "--detect-zeroes",
        "--bind",
        "--socket",
        "--offset",
        "--snapshot",
        "--load-snapshot",
        "--connect",
        "--object",
        "--tls-creds",
        "--tls-authz",
        "--tls-hostname",
        "--pid-file",
        "--trace",
        "--bitmap",
        "--selinux-label",
        "-D",
        "-p",
        "-x",
        "-e",
        "-f",
        "-b",
        "-k",
        "-o",
        "-l",
        "-c",
        "-P",
        "-B",
        "-T",
    }
)
"""Options of qemu-nbd that take a value. Source: qemu-nbd(8), 7.2."""


def parse(line: Sequence[str]) -> Served | None:
    """What an argv serves; None if it is not a qemu-nbd."""
    starting = list(line[:3]) == ["sh", "-c", ENTER]
    rest = tuple(line[3:] if starting else line)
    if not rest or not posixpath.basename(rest[0]).startswith("qemu-nbd"):
        return None
    options: dict[str, str] = {}
    image = None
    words = iter(rest[1:])
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            options[name] = value
        elif word in _VALUED:
            options[_SHORT.get(word, word)] = next(words, "")
        elif not word.startswith("-"):
            image = word
    port = options.get("--port", "")
    return Served(
        rest,
        Mark.parse(options.get("--description", "")),
        starting,
        image,
        int(port) if re.fullmatch(r"[0-9]{1,5}", port) else None,
    )


_POSITION: Final = re.compile(r"disk([0-9]{1,9})$")


def export_of(line: Sequence[str], mark: Mark, size: Bytes | None) -> Export:
    """What a server of ours serves, as far as its argv tells; `size` is what it answered."""
    name = line[line.index("--export-name") + 1] if "--export-name" in line[:-1] else ""
    position = _POSITION.search(name)
    return Export(
        vm=mark.vm,
        key=mark.disk,
        position=int(position.group(1)) if position else 0,
        run=mark.run,
        attempt=mark.attempt,
        name=name,
        image=line[-1],
        size=size,
        read_only="--read-only" in line,
    )
