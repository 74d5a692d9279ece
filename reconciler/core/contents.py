"""What a restore test read of a run's disks: values, the verdict, and the words for it."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, to_builtins

from reconciler.core.units import Bytes, format_size

FORMAT_VERSION: Final = "1.0"
"""Of the JSON document; more may be added to it."""


class FileRead(Struct, frozen=True, kw_only=True):
    """One file that was read from its first byte to its last."""

    path: str
    """In its file system; absolute."""
    size: Bytes
    sha256: str


class Volume(Struct, frozen=True, kw_only=True):
    """A part of a disk that may hold a file system: a partition, a logical volume, all of it."""

    where: str
    """`disk`, `partition 2`, `lvm/vg-root`."""
    start: Bytes | None = None
    """On its disk; None: it is not in one piece."""
    size: Bytes | None = None
    type: str = ""
    """As libblkid calls it: `ext4`, `LVM2_member`, `crypto_LUKS`; empty: nothing is recognised."""
    label: str = ""
    uuid: str = ""
    used: Bytes | None = None
    """Of its size, by the file system's own count; None: not told."""
    names: tuple[str, ...] = ()
    """What is in its root directory."""
    how: str = ""
    """The tool that read it; empty: none did."""
    file: FileRead | None = None
    note: str = ""
    """Why less was read than could be, where that is no damage."""
    problem: str = ""
    """What could not be read, and should be readable."""


class DiskRead(Struct, frozen=True, kw_only=True):
    """One disk of a run, as far as it could be read."""

    key: int
    image: str
    """Absolute path of the file on top."""
    layers: int = 0
    """Images in its chain, itself too."""
    size: Bytes | None = None
    """None: it was never read."""
    table: str = ""
    """`gpt`, `mbr`, or `none`: what divides it."""
    view: str = ""
    """How tools saw it: `fuse`, or `copy`; empty: none was needed."""
    volumes: tuple[Volume, ...] = ()
    problem: str = ""

    @property
    def problems(self) -> list[str]:
        """Everything that should be readable and is not."""
        found = [self.problem] if self.problem else []
        return found + [f"{one.where}: {one.problem}" for one in self.volumes if one.problem]

    @property
    def files(self) -> list[FileRead]:
        return [one.file for one in self.volumes if one.file]


class RestoreTest(Struct, frozen=True, kw_only=True):
    """What was read of a run."""

    vm: str
    run: str
    job_id: str
    file: str = ""
    """The file that was to be read; empty: any."""
    every: bool = True
    """It was about all disks of the run."""
    disks: tuple[DiskRead, ...] = ()

    @property
    def files(self) -> list[FileRead]:
        return [file for disk in self.disks for file in disk.files]

    @property
    def problems(self) -> list[str]:
        found = [f"disk {one.key}: {why}" for one in self.disks for why in one.problems]
        if self.file and not self.files:
            found.append(f"no file {self.file} is on what could be read of its disks")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def summary(self) -> str:
        """One sentence for events, the history and people."""
        problems = self.problems
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            return f"{problems[0]}{more}"
        systems = [one.type for disk in self.disks for one in disk.volumes if one.how]
        said = [_many(len(self.disks), "disk")]
        if systems:
            said.append(f"{_many(len(systems), 'file system')} ({', '.join(systems)})")
        count = len(self.files)
        said.append(f"{_many(count, 'file')} read back" if count else "no file was read back")
        return ", ".join(said)

    def to_json(self) -> dict[str, Any]:
        """As it is printed, and kept with the run."""
        return {
            "format_version": FORMAT_VERSION,
            **to_builtins(self),
            "disks": [{**to_builtins(one), "key": str(one.key)} for one in self.disks],
            "ok": self.ok,
            "problems": self.problems,
            "summary": self.summary,
        }


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


NAMES: Final = 12
"""Names of a root directory that a person is shown."""


def lines(test: RestoreTest) -> list[str]:
    """What was read, for people."""
    out = []
    for disk in test.disks:
        out.append(f"disk {disk.key}   {_disk(disk)}")
        for one in disk.volumes:
            out += [f"    {line}" for line in _volume(one)]
        if disk.problem:
            out.append(f"    problem: {disk.problem}")
    return out


def _disk(disk: DiskRead) -> str:
    said = [format_size(disk.size)] if disk.size is not None else []
    if disk.layers:
        said.append(f"{_many(disk.layers, 'image')} deep" if disk.layers > 1 else "one image")
    if disk.table:
        kinds = {"gpt": "GPT", "mbr": "MBR", "none": "no partition table"}
        said.append(kinds[disk.table])
    if disk.view == "copy":
        said.append("read from a temporary copy")
    return ", ".join(said) or disk.image


def _volume(one: Volume) -> list[str]:
    head = [one.where, one.type or "nothing known"]
    head += [f"label {one.label}"] if one.label else []
    head += [one.uuid] if one.uuid else []
    if one.size is not None:
        used = f", {format_size(one.used)} used" if one.used is not None else ""
        head.append(f"{format_size(one.size)}{used}")
    out = ["   ".join(head)]
    if one.how:
        more = f" … ({len(one.names)})" if len(one.names) > NAMES else ""
        out.append(f"    /: {'  '.join(one.names[:NAMES]) or 'empty'}{more}   (by {one.how})")
    if one.file:
        size = f"{one.file.size} bytes"
        out.append(f"    {one.file.path}   {size}   sha256 {one.file.sha256}")
    if one.note:
        out.append(f"    {one.note}")
    if one.problem:
        out.append(f"    problem: {one.problem}")
    return out
