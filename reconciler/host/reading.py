"""Read what is in a disk without mounting it: a server of our own, a plain file, and tools.

Nothing here needs root, a kernel module, or a port. Every child ends with us, also when we are
killed; the scratch directory of one that was killed is removed by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import math
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import quote

from msgspec import Struct

from reconciler.core.errors import HostError
from reconciler.core.mark import READER
from reconciler.core.units import Bytes, Seconds

PREFIX: Final = "reconciler-reading-"
EXPORT: Final = "disk"
"""The export name; the socket is in a directory of our own, so it needs to tell nothing."""
GRACE: Final[Seconds] = 5.0
"""How long a child may take to end in order."""
MOUNT: Final[Seconds] = 10.0
"""How long nbdfuse may take to show its file. Measured: 60 ms."""
MOST_OUTPUT: Final[Bytes] = 16 << 20
"""Bytes of a listing. A directory with more is not one that a person reads."""
HEAD: Final[Bytes] = 4 << 20
"""Bytes at the beginning of a volume that libblkid is shown. VMFS has its magic at 2 MiB, and none
that it knows comes later. Source: libblkid/src/superblocks."""
TAIL: Final[Bytes] = 1 << 20
"""The same at its end, where md, DRBD and copies of superblocks are."""
_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"
"""Where else tools are: an ordinary user's PATH does not have the first two."""
_SET_DEATH_SIGNAL: Final = 1
"""PR_SET_PDEATHSIG. Source: linux/prctl.h."""
_LIBC: Final = ctypes.CDLL(None)


class Deadline:
    """When all of it is to be over."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def left(self, most: Seconds = 3600.0) -> Seconds:
        """Raises HostError when nothing is left."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise HostError(
                f"not done within {self.seconds:g} s; give it longer with --timeout", "TimedOut"
            )
        return min(left, most)


# -- a directory that nobody leaves behind


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory of our own, gone afterwards; one of a process that was killed is removed, too.

    Its lock says that somebody lives in it.
    """
    sweep()
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # another's sweep came between the two calls
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def sweep() -> None:
    """Remove the directories of our user in which nobody lives any more."""
    above = tempfile.gettempdir()
    for name in os.listdir(above):
        if not name.startswith(PREFIX):
            continue
        path = os.path.join(above, name)
        with contextlib.suppress(OSError):  # another's, gone meanwhile, or lived in
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid != os.geteuid():
                    continue
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)


# -- children that end with us


def find(tool: str) -> str | None:
    """The absolute path of a tool; None: it is not installed."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{_PATH}")


def _tied() -> Callable[[], None]:
    """What a child does before it becomes its program, so that the kernel kills it with us."""
    parent = os.getpid()

    def tie() -> None:
        _LIBC.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # we were killed before the kernel was told

    return tie


class Child:
    """A process that runs beside; what it says is in its log."""

    def __init__(self, argv: Sequence[str], log: Path) -> None:
        """Raises HostError."""
        self.log = log
        try:
            with log.open("wb") as stderr:
                self.process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={**os.environ, "LC_ALL": "C"},
                    start_new_session=True,  # Ctrl-C is for us, and we end it
                    preexec_fn=_tied(),
                )
        except OSError as error:
            raise HostError(f"cannot start {argv[0]}: {error.strerror}", "CannotStart") from error

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Ask it to end, and then do not ask. One that storage holds up is left to the kernel."""
        for ask in (self.process.terminate, self.process.kill):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                return


class Ran(Struct, frozen=True):
    """What a tool said."""

    code: int
    out: bytes
    said: str
    """Its stderr, without empty lines."""


def run(
    argv: Sequence[str],
    deadline: Deadline,
    log: Path,
    take: Callable[[bytes], object] | None = None,
) -> Ran:
    """Run a tool to its end; `take` gets its output piece by piece. Raises HostError."""
    kept = bytearray()
    taken = take or kept.extend
    try:
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,
                preexec_fn=_tied(),
            )
    except OSError as error:
        raise HostError(f"cannot start {argv[0]}: {error.strerror}", "CannotStart") from error
    assert process.stdout is not None
    try:
        fd = process.stdout.fileno()
        while _readable(fd, deadline.left()):
            piece = os.read(fd, 1 << 20)
            if not piece:
                break
            taken(piece)
            if len(kept) > MOST_OUTPUT:
                raise HostError(f"{os.path.basename(argv[0])} says more than can be read")
        code = process.wait(deadline.left())
    except subprocess.TimeoutExpired:
        deadline.left()
        raise
    finally:
        process.stdout.close()
        if process.poll() is None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Ran(code, bytes(kept), "; ".join(said))


# -- the server, and a plain file of what it serves


@contextlib.contextmanager
def served(binary: str, image: str, note: str, folder: Path) -> Iterator[tuple[Child, Path]]:
    """A server of our own that reads a chain, on a Unix socket that only we can reach.

    `note` says in its argv what it is for. Raises HostError.
    """
    socket = folder / "socket"
    argv = [
        binary,
        "--read-only",
        "--persistent",
        *("--shared", "0"),
        *("--format", "qcow2"),
        *("--export-name", EXPORT),
        *("--description", f"{READER} {note}"),
        *("--socket", str(socket)),
        image,
    ]
    child = Child(argv, folder / "server.log")
    try:
        yield child, socket
    finally:
        child.end()
        socket.unlink(missing_ok=True)


class View(Struct, frozen=True):
    """A disk as a plain file."""

    path: str
    kind: str
    """`fuse`, or `copy`."""
    enter: tuple[str, ...] = ()
    """What runs a tool where it sees `inside`."""
    inside: str = ""
    """The same file for a tool that resolves links; see `enter`."""


def address(socket: Path) -> str:
    return f"nbd+unix:///{EXPORT}?socket={quote(str(socket))}"


@contextlib.contextmanager
def fuse(socket: Path, size: Bytes, folder: Path, deadline: Deadline) -> Iterator[View | str]:
    """The disk as a file by nbdfuse, which reads what is asked for and nothing else; or why not.

    Its mount is in a namespace of its own: nobody else sees it, and the kernel takes it away with
    the process. Root needs no user namespace for that, others do. Source: mount_namespaces(7).
    """
    tools = {name: find(name) for name in ("nbdfuse", "unshare", "setpriv", "nsenter")}
    missing = [name for name, path in tools.items() if path is None]
    if missing:
        packages = {"nbdfuse": "libnbd-bin"}
        name = missing[0]
        yield f"{name} is not installed ({packages.get(name, 'util-linux')})"
        return
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield "/dev/fuse is not there, or not ours to open"
        return
    user = ("--user", "--map-root-user")
    forms = ((), user) if os.geteuid() == 0 else (user,)
    point = folder / "view"
    why = ""
    for form in forms:
        point.touch()
        # A new user namespace makes the kernel forget whom we die with, so it is said once more.
        child = Child(
            [
                *(str(tools["unshare"]), *form, "--mount", "--propagation", "private", "--"),
                *(str(tools["setpriv"]), "--pdeathsig", "KILL", "--"),
                *(str(tools["nbdfuse"]), "--readonly", str(point), address(socket)),
            ],
            folder / "fuse.log",
        )
        try:
            path = f"/proc/{child.pid}/root{point}"
            until = time.monotonic() + deadline.left(MOUNT)
            while not (shown := _size(path) == size) and not child.ended:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
            if shown:
                spaces = ("--user", "--preserve-credentials") if form else ()
                enter = (str(tools["nsenter"]), f"--target={child.pid}", "--mount", *spaces, "--")
                yield View(path, "fuse", enter, str(point))
                return
            said = child.log.read_text(errors="replace").strip().splitlines()
            why = said[-1] if said else f"nbdfuse showed nothing within {MOUNT:g} s"
        finally:
            child.end()
    yield f"nbdfuse cannot mount here: {why}"


def _readable(fd: int, seconds: float) -> bool:
    """Whether there is something to read within that time. A daemon's descriptors go beyond the
    1023 that select(2) can be asked about."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(seconds * 1000))))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def copy(
    socket: Path, allocated: Bytes, limit: Bytes, folder: Path, deadline: Deadline
) -> View | str:
    """The disk as a sparse copy, if what is in it is not more than `limit`; or why not.

    Raises HostError where it cannot be read.
    """
    if allocated > limit:
        return "TooBig"
    free = os.statvfs(folder)
    if allocated > free.f_bavail * free.f_frsize:
        return f"there is no room for a copy below {folder.parent}"
    path = folder / "copy"
    done = run(
        ["qemu-img", "convert", "-f", "raw", "-O", "raw", address(socket), str(path)],
        deadline,
        folder / "tool.log",
    )
    if done.code:
        raise HostError(f"cannot copy the disk: {done.said}", "Unreadable")
    return View(str(path), "copy", (), str(path))


# -- what is there


class Kind(Struct, frozen=True):
    """What libblkid finds."""

    type: str = ""
    label: str = ""
    uuid: str = ""
    usage: str = ""
    """`filesystem`, `raid`, `crypto`, `other`."""
    empty: bool = False
    """There are only zeros where something would be."""
    note: str = ""


def probe(
    read: Callable[[Bytes, Bytes], bytes],
    start: Bytes,
    size: Bytes,
    folder: Path,
    deadline: Deadline,
) -> Kind:
    """What libblkid makes of a volume: it is shown a sparse file with the two ends of it.

    Raises HostError.
    """
    tool = find("blkid")
    if tool is None:
        return Kind(note="blkid is not installed (util-linux), so its content is not known")
    head = read(start, min(HEAD, size))
    at = max(len(head), size - TAIL)
    tail = read(start + at, size - at)
    if not (head.strip(b"\0") or tail.strip(b"\0")):
        return Kind(empty=True)
    path = folder / "ends"
    with path.open("wb") as file:
        file.write(head)
        file.seek(at)
        file.write(tail)
        file.truncate(size)
    done = run([tool, "-p", "-o", "export", str(path)], deadline, folder / "tool.log")
    path.unlink()
    if done.code == 8:
        return Kind(note="blkid finds more than one kind of content in it")
    # 2: nothing that it knows. Source: blkid(8).
    if done.code not in (0, 2):
        raise HostError(f"blkid ends with {done.code}: {done.said}")
    found = dict(
        line.split("=", 1) for line in done.out.decode(errors="replace").splitlines() if "=" in line
    )
    return Kind(
        type=found.get("TYPE", ""),
        label=re.sub(r"\\(.)", r"\1", found.get("LABEL", "")),
        uuid=found.get("UUID", ""),
        usage=found.get("USAGE", ""),
    )


# -- files


class Entry(Struct, frozen=True):
    """One name in a directory."""

    name: str
    kind: str
    """`file`, `directory`, or `other`."""
    size: Bytes = 0


class About(Struct, frozen=True):
    """What a file system says of itself."""

    size: Bytes | None = None
    """None: not told."""
    used: Bytes | None = None
    note: str = ""


class Files(Protocol):
    """A file system that a tool can read. Paths are absolute; all raise HostError."""

    how: str

    def entries(self, path: str) -> list[Entry]:
        """What is in a directory, without itself and the one above."""
        ...

    def digest(self, path: str) -> tuple[Bytes, str]:
        """Read a file to its end: its size, and its SHA-256."""
        ...

    def about(self) -> About:
        """What it says of itself."""
        ...


class Debugfs:
    """ext2, ext3, ext4, by e2fsprogs' debugfs, which opens read-only unless told otherwise."""

    how = "debugfs"

    def __init__(self, view: View, start: Bytes, folder: Path, deadline: Deadline) -> None:
        self.tool = find("debugfs") or "debugfs"
        self.file = f"{view.path}?offset={start}"
        self.deadline, self.log = deadline, folder / "tool.log"

    def ask(self, request: str, take: Callable[[bytes], object] | None = None) -> bytes:
        """debugfs ends with 0 whatever happens; it failed if it says more than its version."""
        done = run([self.tool, "-R", request, self.file], self.deadline, self.log, take)
        said = re.sub(r"^debugfs [^;]*(; |$)", "", done.said)
        if done.code or said:
            raise HostError(f"debugfs: {said or f'it ends with {done.code}'}", "Unreadable")
        return done.out

    def entries(self, path: str) -> list[Entry]:
        found = []
        for line in self.ask(f"ls -p {_quoted(path)}").decode(errors="surrogateescape").split("\n"):
            parts = line.split("/")
            # /inode/mode/uid/gid/name/size/; a directory has no size. A name with a line break in
            # it is none of ours to show.
            if len(parts) != 8 or not parts[1].isdigit() or parts[5] in (".", ".."):
                continue
            mode = int(parts[2], 8)
            kind = "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
            found.append(Entry(parts[5], kind, int(parts[6] or 0)))
        return found

    def digest(self, path: str) -> tuple[Bytes, str]:
        return _digest(lambda take: self.ask(f"cat {_quoted(path)}", take))

    def about(self) -> About:
        text = self.ask("show_super_stats -h").decode(errors="replace")
        found = dict(re.findall(r"^(Block count|Free blocks|Block size):\s+(\d+)$", text, re.M))
        if len(found) < 3:
            raise HostError("debugfs: its superblock says no size", "Unreadable")
        block = int(found["Block size"])
        count, free = int(found["Block count"]), int(found["Free blocks"])
        mounted = re.search(r"^Filesystem features:.* needs_recovery\b", text, re.M)
        note = "its journal was not replayed: the VM was running" if mounted else ""
        return About(count * block, (count - free) * block, note)


def _quoted(path: str) -> str:
    """A word for debugfs. Source: e2fsprogs, lib/ss/parse.c."""
    return '"' + path.replace('"', '""') + '"'


class Grub:
    """What GRUB can boot from, by its grub-fstest: XFS, Btrfs, NTFS, FAT and others, and LVM."""

    how = "grub-fstest"
    TOOLS: Final = ("grub-fstest", "grub2-fstest")

    def __init__(self, view: View, device: str, folder: Path, deadline: Deadline) -> None:
        self.view, self.device = view, device
        self.deadline, self.log = deadline, folder / "tool.log"

    @classmethod
    def tool(cls) -> str | None:
        return next(filter(None, map(find, cls.TOOLS)), None)

    def ask(self, *words: str, take: Callable[[bytes], object] | None = None) -> bytes:
        """It ends with 0 whatever a listing finds; it failed if it says something."""
        tool = self.tool() or self.TOOLS[0]
        argv = [*self.view.enter, tool, self.view.inside, *words]
        done = run(argv, self.deadline, self.log, take)
        if done.code or done.said:
            said = re.sub(r"^\S*grub2?-fstest: (error: )?", "", done.said)
            raise HostError(f"grub-fstest: {said or f'it ends with {done.code}'}", "Unreadable")
        return done.out

    def devices(self) -> list[str]:
        """`loop0,gpt1`, `lvm/vg-root` and so on."""
        return re.findall(r"\(([^()]+)\)", self.ask("ls").decode(errors="replace"))

    def kind(self) -> Kind:
        """What it says of the device."""
        text = self.ask("ls", f"({self.device})").decode(errors="replace")
        type_ = re.search(r"Filesystem type (\S+)", text)
        label = re.search(r"Label `(.*?)'", text)
        uuid = re.search(r"UUID ([0-9A-Za-z-]+)", text)
        return Kind(
            type=type_[1].rstrip("*") if type_ else "",
            label=label[1] if label else "",
            uuid=uuid[1] if uuid else "",
            usage="filesystem" if type_ else "",
        )

    def entries(self, path: str) -> list[Entry]:
        text = self.ask("ls", "--", "-l", f"({self.device}){path.rstrip('/')}/")
        found = []
        for line in text.decode(errors="surrogateescape").split("\n"):
            seen = re.match(r"(DIR|\d+) +(?:\d{14} )?(.+)$", line)
            if seen:
                size, name = seen[1], seen[2]
                directory = size == "DIR"
                name = name.removesuffix("/") if directory else name
                kind = "directory" if directory else "file"
                found.append(Entry(name, kind, 0 if directory else int(size)))
        return found

    def digest(self, path: str) -> tuple[Bytes, str]:
        return _digest(lambda take: self.ask("cat", f"({self.device}){path}", take=take))

    def about(self) -> About:
        return About()


def _digest(ask: Callable[[Callable[[bytes], object]], object]) -> tuple[Bytes, str]:
    hashed, size = hashlib.sha256(), 0

    def take(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        hashed.update(piece)

    ask(take)
    return size, hashed.hexdigest()


class Guestfish:
    """Whatever Linux can mount, by libguestfs: it boots a small kernel of its own that mounts the
    disk, journals are replayed in memory, and RAID and LVM are put together. Source: guestfish(1).
    """

    how = "guestfish"
    _MARK: Final = "-- done --"

    def __init__(self, socket: Path, folder: Path, deadline: Deadline) -> None:
        """Boots it. Raises HostError."""
        tool = find("guestfish")
        if tool is None:
            raise HostError(
                "guestfish is not installed: `apt-get install guestfs-tools`, or leave --with out",
                "ToolMissing",
            )
        self.deadline, self.log = deadline, folder / "guestfish.log"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [tool, "--ro", "--format=raw", "-a", f"nbd:///{EXPORT}?socket={socket}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                # By libvirt, the kernel would be somebody else's child.
                env={**os.environ, "LC_ALL": "C", "LIBGUESTFS_BACKEND": "direct"},
                start_new_session=True,
                preexec_fn=_tied(),
            )
        self.rest = b""
        try:
            self.ask("run")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """The kernel goes with it: its qemu ends when the line to guestfish is cut."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        for ask in (None, self.process.terminate, self.process.kill):
            if ask:
                ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
                break
        self.process.stdout.close()

    def ask(self, *words: str) -> str:
        """What a command prints. Raises HostError with what it says where it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        said = self.log.stat().st_size
        line = " ".join([words[0], *map(_guestfish_word, words[1:])])
        try:
            self.process.stdin.write(
                f"-{line}\necho {_guestfish_word(self._MARK)}\n".encode(errors="surrogateescape")
            )
            self.process.stdin.flush()
        except OSError as error:
            raise HostError(f"guestfish ended: {self._words(0)}", "Unreadable") from error
        end = f"{self._MARK}\n".encode()
        fd = self.process.stdout.fileno()
        while not self.rest.endswith(end):
            if not _readable(fd, self.deadline.left()):
                continue
            piece = os.read(fd, 1 << 20)
            if not piece:
                raise HostError(f"guestfish ended: {self._words(0)}", "Unreadable")
            self.rest += piece
            if len(self.rest) > MOST_OUTPUT:
                raise HostError("guestfish says more than can be read")
        out, self.rest = self.rest.removesuffix(end), b""
        wrong = self._words(said)
        if wrong:
            raise HostError(f"guestfish: {wrong}", "Unreadable")
        return out.decode(errors="surrogateescape")

    def _words(self, since: int) -> str:
        text = self.log.read_bytes()[since:].decode(errors="replace")
        said = "; ".join(line for line in text.splitlines() if line.strip())
        return re.sub(r"(\*stdin\*:\d+: )?libguestfs: error: ", "", said)

    def filesystems(self) -> list[tuple[str, str]]:
        """(device, type) of whatever can be mounted, and of swap; `unknown` is a type too."""
        lines = self.ask("list-filesystems").splitlines()
        return [(one, kind) for one, _, kind in (line.rpartition(": ") for line in lines) if one]

    def mount(self, device: str) -> Kind:
        """Have this one mounted, in the place of the one before; and what it is called."""
        self.ask("umount-all")
        # Before it is mounted: what tells an NTFS's label wants it for itself.
        label, uuid = self.ask("vfs-label", device).strip(), self.ask("vfs-uuid", device).strip()
        self.ask("mount-ro", device, "/")
        return Kind(label=label, uuid=uuid, usage="filesystem")

    def entries(self, path: str) -> list[Entry]:
        found = []
        for line in self.ask("ll", path).split("\n"):
            # As `ls -la` prints it; a device has two numbers in the place of its size.
            seen = re.match(
                r"([-dlcbps])\S+ +\d+ +\S+ +\S+ +(?:\d+, +)?(\d+) +\S+ +\S+ +\S+ (.+)$", line
            )
            if seen and seen[3] not in (".", ".."):
                kind = {"d": "directory", "-": "file"}.get(seen[1], "other")
                name = seen[3].split(" -> ")[0] if seen[1] == "l" else seen[3]
                found.append(Entry(name, kind, int(seen[2]) if kind == "file" else 0))
        return found

    def digest(self, path: str) -> tuple[Bytes, str]:
        return int(self.ask("filesize", path)), self.ask("checksum", "sha256", path).strip()

    def about(self) -> About:
        found = dict(
            re.findall(r"^(bsize|frsize|blocks|bfree): (\d+)$", self.ask("statvfs", "/"), re.M)
        )
        if not {"blocks", "bfree"} <= found.keys():
            return About()
        block = int(found.get("frsize") or found["bsize"])
        return About(
            int(found["blocks"]) * block, (int(found["blocks"]) - int(found["bfree"])) * block
        )


def _guestfish_word(word: str) -> str:
    """Source: guestfish(1), "Quoting"."""
    if "\n" in word:
        raise HostError("guestfish cannot be asked for a name with a line break in it")
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
