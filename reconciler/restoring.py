"""Restore test: whether what a run holds can be read, disk by disk, down to a file. Boots nothing.

Servers, ports and the hub's lock have no part in it: it reads images that nobody writes any more.
"""

from __future__ import annotations

import posixpath
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actual import Image
from reconciler.core.call import Call, CallState
from reconciler.core.contents import DiskRead, FileRead, RestoreTest, Volume
from reconciler.core.desired import Export
from reconciler.core.errors import HostError, UsageError, nearest
from reconciler.core.foreign import printable
from reconciler.core.guards import broken_chain
from reconciler.core.ledger import Ledger
from reconciler.core.names import hint
from reconciler.core.partitions import Table, table
from reconciler.core.settings import Settings
from reconciler.core.units import Bytes, Seconds, format_size, stamp
from reconciler.host import images, nbd, patience, qemu_nbd, reading
from reconciler.host.reading import Deadline, Debugfs, Files, Grub, Guestfish, Kind, View
from reconciler.repositories import chain, roots_of

ANSWER: Final[Seconds] = 60.0
"""How long one read may take: storage that wakes up takes seconds."""
MOST_DIRECTORIES: Final = 2000
"""That are looked through for a first file."""
FIRST_FILE: Final[Bytes] = 256 << 20
"""Bytes. A first file that is larger is passed over for a smaller one: it proves no more."""
_EXT: Final = frozenset({"ext2", "ext3", "ext4", "ext4dev"})
_NEVER_EMPTY: Final = _EXT | {"ntfs"}
"""Whose root directory has something in it from the first day: lost+found, or $MFT."""
_CLOSED: Final = {
    "LVM2_member": "a physical volume of LVM",
    "crypto_LUKS": "it is encrypted, and nobody here has the key",
    "BitLocker": "it is encrypted, and nobody here has the key",
    "swap": "swap space: there is no file in it",
    "linux_raid_member": "a part of a software RAID, which is not put together here",
}
"""What holds no files that could be read, and why that is no damage."""
_PARTITION: Final = {"gpt": "gpt", "mbr": "msdos"}
"""How GRUB calls the partitions of a table."""


class Order(Struct, frozen=True, kw_only=True):
    """What is to be read."""

    file: str = ""
    """Absolute path; empty: the first file that is found, on each disk."""
    disk: int | None = None
    """The key of one disk; None: all."""
    guestfish: bool = False
    """Let libguestfs read, in the place of the file systems' own tools."""
    copy_limit: Bytes = 4 << 30
    """Of a temporary copy, where nothing else can be had."""
    timeout: Seconds = 600.0


def run_of(ledger: Ledger, vm: str, run: str | None) -> Call:
    """The completed run that is meant. Raises UsageError, HostError."""
    completed = ledger.completed_runs(vm)
    if vm not in ledger.known:
        near = hint(vm, ledger.known, ledger.shown)
        raise UsageError(f"this hub has no run of a VM {vm!r}{near}")
    if run is None and not completed:
        raise HostError(
            f"cannot test a restore of {vm}: no run of it is completed; see reconciler history {vm}"
        )
    name = completed[-1] if run is None else run
    call = ledger.latest(vm, name)
    newest = ", ".join(completed[-5:]) or "none"
    if call is None:
        raise UsageError(
            f"{vm} has no run {name!r}{nearest(name, completed)} (completed: {newest})"
        )
    if call.state is not CallState.COMPLETED:
        raise HostError(
            f"cannot test a restore of run {name} of {vm}: it is {call.state}, so it is not a "
            f"backup; completed: {newest}"
        )
    removed = ledger.shelf.of([call.job_id])[call.job_id].removed
    if removed:
        raise HostError(
            f"cannot test a restore of run {name} of {vm}: its images were removed at "
            f"{stamp(removed)}, as its `keep` does not keep it"
        )
    return call


def restore_test(settings: Settings, call: Call, order: Order) -> RestoreTest:
    """Read a run. What cannot be read is in the answer; raises UsageError, HostError for what has
    nothing to do with the run."""
    exports = [one for one in call.exports if order.disk in (None, one.key)]
    if not exports:
        keys = ", ".join(str(one.key) for one in call.exports)
        raise UsageError(f"run {call.run} of {call.vm} has no disk {order.disk} (there: {keys})")
    binary = qemu_nbd.find(settings.qemu_nbd.binary)
    deadline = Deadline(order.timeout)
    disks = []
    for export in exports:
        with reading.scratch() as folder:
            one = _Disk(settings, binary, call, export, order, folder, deadline)
            disks.append(one.result())
    return RestoreTest(
        vm=call.vm,
        run=call.run,
        job_id=call.job_id,
        file=order.file,
        every=order.disk is None,
        disks=tuple(disks),
    )


class _Disk:
    """The reading of one disk."""

    def __init__(
        self,
        settings: Settings,
        binary: str,
        call: Call,
        export: Export,
        order: Order,
        folder: Path,
        deadline: Deadline,
    ) -> None:
        self.settings, self.binary, self.call, self.export = settings, binary, call, export
        self.order, self.folder, self.deadline = order, folder, deadline
        self.found = DiskRead(key=export.key, image=export.image)
        self.links: list[Image] = []
        self.stack = ExitStack()
        self.seen: View | str | None = None
        """The disk as a file, or why there is none; None: nobody has asked for it yet."""

    def result(self) -> DiskRead:
        try:
            self.read()
        except HostError as error:
            self.found = replace(self.found, problem=str(error))
        return self.found

    def read(self) -> None:
        """Raises HostError; what was found until then is in `found`."""
        self.links = self.chain()
        self.found = replace(self.found, layers=len(self.links))
        for link in self.links:
            # What is cut off at the end of a file is read as zeros, without an error.
            wrong = images.check(link.path, self.deadline.left())
            if wrong:
                raise HostError(f"{link.path} is damaged: {wrong}")
        with self.reader() as reader, self.stack:
            self.found = replace(self.found, size=reader.size)
            if self.export.size is not None and reader.size != self.export.size:
                raise HostError(
                    f"it has {format_size(reader.size)} ({reader.size} bytes), the run recorded "
                    f"{format_size(self.export.size)} ({self.export.size} bytes)"
                )
            divided = table(reader.read, reader.size)
            self.found = replace(self.found, table=divided.kind, problem=divided.problem)
            volumes = self.guest() if self.order.guestfish else self.volumes(reader, divided)
            for volume in volumes:
                self.found = replace(self.found, volumes=(*self.found.volumes, volume))
            if isinstance(self.seen, View):
                self.found = replace(self.found, view=self.seen.kind)

    def chain(self) -> list[Image]:
        """The images that make up the disk, by their headers. Raises HostError."""
        path = self.export.image
        root = roots_of(self.settings, path)[-1]
        answers, silent = patience.ask({root: [partial(chain, path, root)]})
        if root in silent:
            said = f"{patience.silence(root)} within {silent[root]:g} s"
            raise HostError(f"cannot look at the repository {root}: {said}")
        (links,) = answers[root]
        top = links[0]
        if top.outside:
            raise HostError(f"{path} leads out of its repository, to {top.outside}")
        if top.error:
            raise HostError(f"cannot look at {path}: {top.error}")
        if not top.exists:
            raise HostError(f"its image {path} is missing")
        broken = broken_chain(top, {one.path: one for one in links})
        if broken:
            raise HostError(broken[1])
        # One that builds on nothing any more was made one with what it was built on.
        if top.backing and top.backing != self.export.backing:
            raise HostError(
                f"{path} builds on {top.backing or 'nothing'}, the run recorded "
                f"{self.export.backing or 'nothing'}"
            )
        return links

    @contextmanager
    def reader(self) -> Iterator[nbd.Reader]:
        """A connection to a server of our own that reads the chain. Raises HostError."""
        note = f"of {self.call.vm}, run {self.call.run}, disk {self.export.key}"
        with reading.served(self.binary, self.export.image, note, self.folder) as (child, socket):
            self.socket = socket
            reader = self.connected(child, socket)
            try:
                yield reader
            finally:
                reader.close()

    def connected(self, child: reading.Child, socket: Path) -> nbd.Reader:
        """The first connection: the socket is there before the images are open."""
        until = time.monotonic() + self.settings.qemu_nbd.start_timeout
        while True:
            try:
                return nbd.Reader(socket, reading.EXPORT, self.deadline.left(ANSWER))
            except HostError:
                if child.ended:
                    said = qemu_nbd.last_words(child.log)
                    raise HostError(f"qemu-nbd cannot read it: {said or 'it ended'}") from None
                if time.monotonic() > until:
                    raise
                self.deadline.left()
                time.sleep(0.01)

    # -- what is on it

    def volumes(self, reader: nbd.Reader, divided: Table) -> Iterator[Volume]:
        """Everything that may hold a file system."""
        found: list[tuple[Volume, str]] = []
        if divided.kind == "none":
            found.append((Volume(where="disk", start=0, size=reader.size), "loop0"))
        for one in divided.partitions:
            where = f"partition {one.number}" + (f" ({printable(one.name)})" if one.name else "")
            device = f"loop0,{_PARTITION[divided.kind]}{one.number}"
            found.append((Volume(where=where, start=one.start, size=one.size), device))
        physical = False
        for volume, device in found:
            known = self.known(reader, volume)
            physical |= known.type == "LVM2_member"
            yield self.opened(known, device)
        if physical:
            yield from self.logical()

    def guest(self) -> Iterator[Volume]:
        """Everything that libguestfs finds. Raises HostError."""
        with closing(Guestfish(self.socket, self.folder, self.deadline)) as guest:
            for device, kind in guest.filesystems():
                volume = Volume(where=device, type="" if kind == "unknown" else kind)
                if not volume.type or kind in _CLOSED:
                    yield replace(volume, note=_CLOSED.get(kind, ""))
                    continue
                try:
                    found = guest.mount(device)
                    volume = replace(volume, label=printable(found.label), uuid=found.uuid)
                    yield listed(volume, guest, self.order.file)
                except HostError as error:
                    yield replace(volume, problem=str(error))

    def known(self, reader: nbd.Reader, volume: Volume) -> Volume:
        """The same, with what libblkid says of it."""
        assert volume.start is not None and volume.size is not None
        if volume.start + volume.size > reader.size:
            return volume  # that it ends behind the disk is told of the table
        try:
            kind = reading.probe(reader.read, volume.start, volume.size, self.folder, self.deadline)
        except HostError as error:
            return replace(volume, problem=str(error))
        return _with(volume, kind)

    def opened(self, volume: Volume, device: str) -> Volume:
        """The same, with its files, where a tool can read them."""
        if volume.problem or volume.note or not volume.type:
            return volume
        if volume.type in _CLOSED:
            return replace(volume, note=_CLOSED[volume.type])
        ext = volume.type in _EXT and reading.find("debugfs")
        if not ext and not Grub.tool():
            package = "debugfs (e2fsprogs)" if volume.type in _EXT else "grub-fstest (grub-common)"
            return replace(volume, note=f"its files were not read: that needs {package}")
        try:
            view = self.view()
            if isinstance(view, str):
                return replace(volume, note=f"its files were not read: {view}")
            files: Files
            if ext:
                files = Debugfs(view, volume.start or 0, self.folder, self.deadline)
            else:
                files = Grub(view, device, self.folder, self.deadline)
                if not files.kind().type:
                    return replace(
                        volume, note="its files were not read: grub-fstest does not know its format"
                    )
            return listed(volume, files, self.order.file)
        except HostError as error:
            return replace(volume, problem=str(error))

    def logical(self) -> Iterator[Volume]:
        """The logical volumes that the disk's physical ones hold."""
        if not Grub.tool():
            return  # that it is LVM is told of the volume
        view = self.view()
        if isinstance(view, str):
            return
        devices = Grub(view, "loop0", self.folder, self.deadline).devices()
        for device in devices:
            if not device.startswith("lvm/"):
                continue
            grub = Grub(view, device, self.folder, self.deadline)
            try:
                volume = _with(Volume(where=device), grub.kind())
                yield listed(volume, grub, self.order.file) if volume.type else volume
            except HostError as error:
                yield Volume(
                    where=device,
                    note=f"it was not read, and may be on other disks too: {error}",
                )

    def view(self) -> View | str:
        """The disk as a file, made when the first tool needs it; or why there is none.

        Raises HostError.
        """
        if self.seen is not None:
            return self.seen
        size = self.found.size or 0
        fuse = reading.fuse(self.socket, size, self.folder, self.deadline)
        self.seen = self.stack.enter_context(fuse)
        if isinstance(self.seen, str):
            allocated = sum(one.allocated for one in self.links)
            limit = self.order.copy_limit
            why = self.seen
            copied = reading.copy(self.socket, allocated, limit, self.folder, self.deadline)
            if copied == "TooBig":
                copied = (
                    f"{why}, and its images have {format_size(allocated)}, more than --copy-limit "
                    f"({format_size(limit)}) lets be copied"
                )
            self.seen = copied
        return self.seen


def _with(volume: Volume, kind: Kind) -> Volume:
    """A volume of a kind."""
    return replace(
        volume,
        type=kind.type,
        label=printable(kind.label),
        uuid=kind.uuid,
        note=kind.note or ("there is nothing in it" if kind.empty else ""),
    )


def listed(volume: Volume, files: Files, wanted: str) -> Volume:
    """A volume with its root directory and one file: the one that is wanted, or the first.

    Raises HostError.
    """
    top = files.entries("/")
    # What NTFS keeps there, the kernel does not show.
    if not top and volume.type in (_EXT if files.how == Guestfish.how else _NEVER_EMPTY):
        raise HostError(f"its root directory is empty, which that of {volume.type} never is")
    about = files.about()
    volume = replace(
        volume,
        how=files.how,
        size=about.size or volume.size,
        used=about.used,
        note=about.note,
        names=tuple(sorted(printable(one.name) for one in top)),
    )
    try:
        chosen = named(files, wanted) if wanted else first(files, top)
        if chosen is None:
            note = "there is no file in it that is not empty"
            return volume if wanted else replace(volume, note=note)
        path, expected = chosen
        count, digest = files.digest(path)
        if count != expected:
            raise HostError(
                f"{printable(path)} ends after {count} bytes, and should have {expected}"
            )
    except HostError as error:
        return replace(volume, problem=str(error))
    return replace(volume, file=FileRead(path=printable(path), size=count, sha256=digest))


def named(files: Files, path: str) -> tuple[str, Bytes] | None:
    """A file by its path, and its size; None: it is not there. Raises HostError."""
    at = "/"
    parts = [part for part in path.split("/") if part]
    for number, part in enumerate(parts, 1):
        entry = next((one for one in files.entries(at) if one.name == part), None)
        if entry is None:
            return None
        at = posixpath.join(at, part)
        last = number == len(parts)
        if last and entry.kind == "file":
            return at, entry.size
        if last or entry.kind == "file":
            return None
        if entry.kind == "other":
            raise HostError(f"{printable(at)} is a link or a device: name a file without one")
    return None


def first(files: Files, top: Sequence[reading.Entry]) -> tuple[str, Bytes] | None:
    """The first file that is not empty, and its size; None: there is none. Raises HostError.

    The nearest to the root, in the order of the directory; a large one only where there is no
    other.
    """
    large: tuple[str, Bytes] | None = None
    waiting: deque[tuple[str, Sequence[reading.Entry] | None]] = deque([("/", top)])
    for _ in range(MOST_DIRECTORIES):
        if not waiting:
            break
        at, entries = waiting.popleft()
        for one in files.entries(at) if entries is None else entries:
            path = posixpath.join(at, one.name)
            if one.kind == "directory":
                waiting.append((path, None))
            elif one.kind == "file" and one.size and not one.name.startswith("$"):
                if one.size <= FIRST_FILE:  # NTFS keeps its own tables in files with a $
                    return path, one.size
                large = large or (path, one.size)
    return large
