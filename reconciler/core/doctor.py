"""What a hub needs: what was seen and tried → a verdict for each, with what helps."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct, field

from reconciler.core.access import sentence
from reconciler.core.actual import Listener, Mount
from reconciler.core.appliances import Health
from reconciler.core.descriptors import files_for, more_files
from reconciler.core.errors import Exit
from reconciler.core.settings import QemuNbd
from reconciler.core.units import (
    Bytes,
    Endpoint,
    Port,
    PortRange,
    Seconds,
    format_duration,
    format_size,
    stamp,
)

FORMAT_VERSION: Final = "1.0"
"""Of the JSON document; more may be added to it."""
GROUPS: Final = (
    "config",
    "python",
    "qemu",
    "ports",
    "repository",
    "state",
    "sna",
    "tunnel",
    "secrets",
    "api",
    "inventory",
    "clock",
    "limits",
    "confinement",
    "daemon",
)
"""The first word of every id, in the order in which they are shown."""
WITHOUT_CONFIG: Final = ("config", "python", "qemu", "clock", "limits", "confinement")
"""What can be tried where the config cannot be read; by the built-in defaults."""

TASKS: Final = 24
"""Threads of a server that is written to. Measured: 4 at rest, 24 under `nbdcopy`."""
IDLE_TASKS: Final = 64
"""Threads of a daemon. Measured: 21 with 40 exports; its pools are of a fixed size."""
WATCHES: Final = 1_024
"""Directories that a watch should have room for: one each, and each symlink's way."""
SLOW: Final[Seconds] = 1.0
"""An fsync that takes longer makes every backup wait: claim, intent and image are such. A disk
takes 1 to 30 ms."""
FEW_INODES: Final = 1_000
"""A run makes some files per disk."""
NETWORK: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.glusterfs", "fuse.sshfs"}
    | {"afs", "lustre", "gfs2", "ocfs2", "beegfs", "virtiofs", "fuse.s3fs", "fuse.rclone"}
)
"""File systems whose locks, links or answers depend on another machine."""
VOLATILE: Final = frozenset({"tmpfs", "ramfs"})
"""File systems that a restart empties."""


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """It cannot be told here. Not a guess, and no failure."""


class Check(Struct, frozen=True):
    """One thing that a hub needs, and how it stands."""

    id: str
    """`group` or `group.what`; what it is of, such as a repository's name, is its second word."""
    title: str
    status: Status
    observed: str
    fix: str = ""
    """The command or the line of the config to type."""

    @property
    def group(self) -> str:
        return self.id.split(".")[0]


def ok(id_: str, title: str, observed: str) -> Check:
    return Check(id_, title, Status.OK, observed)


def warning(id_: str, title: str, observed: str, fix: str) -> Check:
    return Check(id_, title, Status.WARNING, observed, fix)


def failed(id_: str, title: str, observed: str, fix: str) -> Check:
    return Check(id_, title, Status.FAILED, observed, fix)


def unknown(id_: str, title: str, observed: str, fix: str = "") -> Check:
    return Check(id_, title, Status.UNKNOWN, observed, fix)


def exit_code(checks: Sequence[Check]) -> Exit:
    """78 where the config cannot be read, 1 where anything else failed."""
    wrong = [one for one in checks if one.status is Status.FAILED]
    if any(one.id == "config" for one in wrong):
        return Exit.CONFIG
    return Exit.ERROR if wrong else Exit.OK


def ordered(checks: Sequence[Check]) -> list[Check]:
    """By group; within one as they were made."""
    return sorted(checks, key=lambda one: GROUPS.index(one.group))


def document(hub: str | None, checks: Sequence[Check]) -> dict[str, Any]:
    """What `-o json` prints."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "checks": [
            {
                "id": one.id,
                "title": one.title,
                "status": str(one.status),
                "observed": one.observed,
                "fix": one.fix or None,
            }
            for one in checks
        ],
    }


# -- what runs it


def runtime(
    python: tuple[int, ...], least: tuple[int, ...], libraries: Mapping[str, tuple[str, str]]
) -> Check:
    """`libraries`: name → (version that is there, or empty; the oldest that is allowed)."""
    title = "Python"
    version = ".".join(map(str, python))
    wrong = [f"{name} {there or 'is missing'}" for name, (there, oldest) in libraries.items()
             if not there or numbers(there) < numbers(oldest)]  # fmt: skip
    if python[: len(least)] < least:
        needed = ".".join(map(str, least))
        return failed("python", title, f"Python {version}", f"install Python {needed} or newer")
    if wrong:
        fix = "pip install --upgrade nbd-reconciler"
        return failed("python", title, f"Python {version}; {', '.join(wrong)}", fix)
    return ok("python", title, f"Python {version}, {len(libraries)} libraries as they should be")


def requirement(line: str) -> tuple[str, str] | None:
    """(name, the oldest version) of a line like `psycopg[binary]>=3.1`; None: it is optional, or
    any version will do. Source: the dependency specifiers of the packaging guide."""
    found = re.match(
        r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*\(?[^;]*?>=\s*([0-9][^,;)\s]*)", line
    )
    return (found[1], found[2]) if found and ";" not in line else None


def numbers(version: str) -> tuple[int, ...]:
    """`7.2.22` as numbers that compare."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


# -- qemu


class Served(Struct, frozen=True, kw_only=True):
    """What became of serving a small image for a moment, by the way that exports are served."""

    failed: str = ""
    took: Seconds = 0.0
    """From the start to the answer."""
    elsewhere: str = ""
    """Where it listened besides the socket that it was given."""
    version: str = ""
    options: str = ""
    """The options of the config that it was given."""
    left: str = ""
    """What could not be cleared away."""


def serving(found: Served, options: QemuNbd) -> Iterator[Check]:
    """Whether a server can be had at all, and whether it listens where it should only."""
    title = "qemu-nbd serves"
    with_options = f" with {found.options}" if found.options else ""
    if found.failed:
        fix = "see what it says, and correct `qemu_nbd:` in the config"
        if "io_uring" in found.failed:
            fix = "leave out `qemu_nbd: {aio: io_uring}`, or have a kernel and a qemu that know it"
        elif "O_DIRECT" in found.failed or "direct" in found.failed:
            fix = f"leave out `qemu_nbd: {{cache: {options.cache}}}`, or use a disk with O_DIRECT"
        yield failed("qemu.serves", title, f"{found.failed}{with_options}", fix)
    elif found.elsewhere:
        fix = "name another binary, `qemu_nbd: {binary: PATH}`: this one ignores its socket"
        yield failed("qemu.serves", title, f"it also listens on {found.elsewhere}", fix)
    else:
        took = format_duration(found.took)
        said = f"a trial server answered after {took}{with_options}, on its own socket only"
        yield ok("qemu.serves", title, said)
    if found.left:
        yield warning("qemu.left", "qemu-nbd's trial", f"left behind: {found.left}", "remove it")


# -- ports


class Ports(Struct, frozen=True, kw_only=True):
    """What is on the ports of the range."""

    range: PortRange
    bind: str
    ours: int = 0
    """Those that servers of this hub, or its daemon, have."""
    strangers: Sequence[Listener] = ()
    unbindable: Mapping[Port, str] = field(default_factory=dict)
    """Ports that could not be bound although nobody listens, and why."""
    ephemeral: tuple[Port, Port] | None = None
    """What the kernel takes outgoing connections' ports from."""
    reserved: str = ""
    """What it leaves out of that: the sysctl's text."""
    disks: int | None = None
    """Disks of all VMs of the inventory."""
    largest: tuple[str, int] | None = None
    """The VM with the most disks."""

    @property
    def usable(self) -> int:
        return len(self.range) - len(self.strangers) - len(self.unbindable)


MOST: Final = 5
"""Strangers that are named one by one."""


def ports(found: Ports) -> Iterator[Check]:
    """Free ports, whether the kernel gives them away, and whether they suffice."""
    yield _free(found)
    yield _ephemeral(found)
    if found.largest:
        vm, most = found.largest
        title = "enough ports"
        if most > found.usable:
            fix = f"widen `ports: {{range: …}}` in the config, now {found.range}"
            said = f"VM {vm} has {most} disks, and {found.usable} ports can be had: it never begins"
            yield failed("ports.enough", title, said, fix)
        elif (found.disks or 0) > found.usable:
            said = (
                f"{found.usable} of the {found.disks} disks in the inventory can be exported at "
                "once; VMs beyond that wait for others to end"
            )
            yield ok("ports.enough", title, said)
        else:
            disks = f"{found.disks} disk{'s' if found.disks != 1 else ''}"
            said = f"{found.usable} ports, {disks} in the inventory"
            yield ok("ports.enough", title, said)


def _free(found: Ports) -> Check:
    title = "port range"
    wrong = [str(one) for one in found.strangers[:MOST]]
    wrong += [f"{port}: {why}" for port, why in list(found.unbindable.items())[:MOST]]
    more = len(found.strangers) + len(found.unbindable) - len(wrong)
    taken = "; ".join(wrong) + (f"; and {more} more" if more > 0 else "")
    free = found.usable - found.ours
    counts = f"{found.range} on {found.bind}: {free} free, {found.ours} in use by this hub"
    if not taken:
        return ok("ports.free", title, counts)
    if any("ermission" in why for why in found.unbindable.values()):
        fix = "take a `ports: {range: …}` above net.ipv4.ip_unprivileged_port_start, or run as root"
    elif any("assign" in why for why in found.unbindable.values()):
        fix = f"correct `ports: {{bind: {found.bind}}}`: this machine has no such address"
    else:
        fix = (
            "end what holds them, or take another `ports: {range: …}`; until then they are left out"
        )
    make = warning if found.usable > 0 else failed
    return make("ports.free", title, f"{counts}; taken by others: {taken}", fix)


def _ephemeral(found: Ports) -> Check:
    title = "the kernel's ports"
    if found.ephemeral is None:
        said = "the kernel does not tell net.ipv4.ip_local_port_range"
        return unknown("ports.ephemeral", title, said)
    first, last = found.ephemeral
    kept = _ranges(found.reserved)
    given = [p for p in found.range if first <= p <= last and not any(a <= p <= b for a, b in kept)]
    spans = f"{first}-{last}"
    if not given:
        return ok("ports.ephemeral", title, f"not given to outgoing connections ({spans})")
    wanted = ",".join(filter(None, (found.reserved, str(found.range))))
    setting = f"net.ipv4.ip_local_reserved_ports={wanted}"
    return warning(
        "ports.ephemeral",
        title,
        f"{len(given)} of them may be taken by any outgoing connection "
        f"(net.ipv4.ip_local_port_range is {spans})",
        f"sysctl -w {setting}; for good: echo {setting} > /etc/sysctl.d/90-reconciler.conf",
    )


def _ranges(text: str) -> list[tuple[Port, Port]]:
    """`8080,10100-10200`. Source: ip-sysctl, ip_local_reserved_ports."""
    found = []
    for part in filter(None, text.split(",")):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            found.append((int(first), int(last or first)))
    return found


# -- storage


class Room(Struct, frozen=True, kw_only=True):
    """What is at a path, and what is left on its file system."""

    exists: bool
    real: str = ""
    """Where it really is."""
    directory: bool = False
    mode: int = 0
    owner: int = 0
    nearest: str = ""
    """Of one that is missing: the nearest directory above it that is there."""
    makeable: bool = False
    """It can be made there."""
    free: Bytes = 0
    """What we may take."""
    inodes: int | None = None
    """Files that may be made; None: the file system keeps no count."""
    read_only: bool = False
    error: str = ""


class Trial(Struct, frozen=True, kw_only=True):
    """What became of writing into a directory as an image is published."""

    failed: str = ""
    """The step that failed, and how; empty: none did."""
    fsync: Seconds = 0.0
    """How long the fsyncs of a new file and of its directory took."""
    direct: str = ""
    """Why O_DIRECT does not work; empty: it does, or was not tried."""


class Storage(Struct, frozen=True, kw_only=True):
    """All that was seen of and tried in one directory."""

    path: str
    hangs: str = ""
    """Why nothing is known of it: it gave no answer."""
    room: Room | None = None
    mount: Mount | None = None
    trial: Trial | None = None


def repository(
    name: str, found: Storage, *, min_free: Bytes, direct: bool, user: str
) -> Iterator[Check]:
    """A place for images. `direct`: servers open images past the page cache."""
    base = f"repository.{name}"
    title = f"repository {name}"
    room = yield from _there(base, title, found, Status.WARNING, user)
    if room is None:
        return
    yield from _writable(base, title, found, user, direct=direct)
    low = [format_size(room.free)] if room.free < min_free else []
    low += [f"{room.inodes} inodes"] if room.inodes is not None and room.inodes < FEW_INODES else []
    said = f"{format_size(room.free)} free"
    said += f", {room.inodes} inodes" if room.inodes is not None else ""
    if low:
        yield warning(
            f"{base}.space",
            title,
            f"only {' and '.join(low)} free (min_free is {format_size(min_free)}): "
            "backups into it are refused or will fail",
            f"make room: df -h {found.path}; df -i {found.path}",
        )
    else:
        yield ok(f"{base}.space", title, said)
    yield _file_system(base, title, found)


def _there(
    base: str, title: str, found: Storage, missing: Status, user: str
) -> Generator[Check, None, Room | None]:
    """What is at the path; returned is that only if it is a directory.

    `missing`: what it is if it is not there and can be made.
    """
    room, path = found.room, found.path
    where = f"{base}.directory"
    if found.hangs or room is None:
        said = found.hangs or "it was not looked at"
        yield failed(where, title, said, f"see to its storage: findmnt -T {path}; dmesg")
    elif room.error:
        yield failed(where, title, f"cannot look at {path}: {room.error}", f"ls -la {path}")
    elif not room.exists and not room.makeable:
        said = f"{path} does not exist, and cannot be made in {room.nearest}"
        yield failed(where, title, said, f"install -d -m 750 -o {user} {path}")
    elif not room.exists:
        said = f"{path} does not exist; it is made when needed, on what {room.nearest} is on"
        fix = f"mount what belongs there, or: mkdir -p {path}" if missing != Status.OK else ""
        yield Check(where, title, missing, said, fix)
    elif not room.directory:
        yield failed(where, title, f"{path} is no directory", "name a directory in the config")
    else:
        really = f", really {room.real}" if room.real != path else ""
        yield ok(where, title, f"{path}{really}, mode {room.mode:o}")
        return room
    return None


def _writable(
    base: str, title: str, found: Storage, user: str, *, direct: bool = False
) -> Iterator[Check]:
    room, trial, path = found.room, found.trial, found.path
    where = f"{base}.writes"
    if room and room.read_only:
        point = found.mount.point if found.mount else path
        said = f"{path} is on a file system that is mounted read-only"
        yield failed(where, title, said, f"mount -o remount,rw {point}")
        return
    if trial is None:
        yield unknown(where, title, "nothing was tried")
        return
    if trial.failed:
        fix = f"chown {user} {path}, or run this as its owner: ls -ld {path}"
        if "link(2)" in trial.failed:
            fix = "use a file system with hard links: images get their names by link(2)"
        elif "space" in trial.failed or "quota" in trial.failed:
            fix = f"make room: df -h {path}; df -i {path}"
        yield failed(where, title, f"{trial.failed} in {path}", fix)
        return
    took = format_duration(trial.fsync)
    if trial.fsync > SLOW:
        said = f"it can be written, but two fsyncs took {took}"
        yield warning(where, title, said, f"see what keeps it busy: iostat -x 1; findmnt -T {path}")
    else:
        yield ok(where, title, f"create, fsync, link, unlink work; two fsyncs took {took}")
    if direct and trial.direct:
        said = f"O_DIRECT does not work: {trial.direct}"
        fix = "leave out `qemu_nbd: {cache: …}`, or use a file system with O_DIRECT"
        yield failed(f"{base}.direct", title, said, fix)
    elif direct:
        yield ok(f"{base}.direct", title, "O_DIRECT works")


def _file_system(base: str, title: str, found: Storage) -> Check:
    mount, where = found.mount, f"{base}.filesystem"
    if mount is None:
        return unknown(where, title, "the kernel's table of mounts does not tell its file system")
    if mount.kind in NETWORK:
        said = f"{mount}: if that machine is away, servers hang, and locks may not be seen there"
        fix = "let one hub alone write to it, and mount it `hard`; or use a local disk"
        return warning(where, title, said, fix)
    if mount.kind in VOLATILE:
        said = f"{mount}: a restart of this machine empties it"
        return warning(where, title, said, "use a disk, unless this is a trial")
    return ok(where, title, str(mount))


# -- state


class Remembered(Struct, frozen=True, kw_only=True):
    """The store, as far as it could be read."""

    error: str = ""
    exists: bool = False
    hub: str = ""
    wrong: str = ""
    """What SQLite finds wrong with it."""
    calls: int = 0
    accepted: int = 0
    """Calls of which an appliance may be acting, and its client reporting."""
    newest: Seconds = 0.0
    """When anything in it was last written; 0: nothing was."""


def state(
    found: Storage, remembered: Remembered, *, hub: str, uid: int, user: str, holder: str | None
) -> Iterator[Check]:
    """Where the hub remembers. `holder`: who holds its lock, in words; empty: nobody; None: it is
    not ours to see."""
    base, title, path = "state", "state directory", found.path
    room = yield from _there(base, title, found, Status.OK, user)
    if room is None:
        return
    if room.mode & 0o022:
        said = f"{path} can be written by others (mode {room.mode:o}): who may, may order this hub"
        yield warning("state.owner", title, said, f"chmod 700 {path}")
    elif room.owner != uid and uid != 0:
        said = f"{path} belongs to uid {room.owner}, and this runs as {user}"
        yield warning("state.owner", title, said, "run reconciler as its owner")
    yield from _writable(base, title, found, user)
    yield _store(remembered, path, hub)
    if holder is None:
        yield unknown(
            "state.lock", "lock", "it is not ours to see", "run this as its owner, or root"
        )
    elif holder:
        yield ok("state.lock", "lock", f"held by {holder}")
    else:
        yield ok("state.lock", "lock", "free")
    mount = found.mount
    if mount and mount.kind in NETWORK:
        said = f"{mount}: SQLite and the lock need a local disk, or two hubs may write at once"
        fix = "use a local directory, `state: /var/lib/reconciler`"
        yield warning("state.filesystem", title, said, fix)
    else:
        yield _file_system(base, title, found)


def _store(remembered: Remembered, path: str, hub: str) -> Check:
    title, where = "store", "state.store"
    if remembered.error:
        return failed(where, title, remembered.error, f"reconciler state info; ls -la {path}")
    if not remembered.exists:
        return ok(where, title, "nothing was applied here yet")
    if remembered.wrong:
        fix = "put a backup back: reconciler state restore FILE"
        return failed(where, title, f"it is damaged: {remembered.wrong}", fix)
    if remembered.hub != hub:
        said = f"it belongs to hub {remembered.hub!r}, and the config says {hub!r}"
        fix = f"write `hub: {remembered.hub}`, or another `state:`"
        return failed(where, title, said, fix)
    calls = f"{remembered.calls} call{'s' if remembered.calls != 1 else ''}"
    return ok(where, title, f"sound, of hub {hub}, {calls}")


# -- what is outside


def appliance(name: str, url: str, found: Health) -> Check:
    """Whether an SNA speaks."""
    id_, title = f"sna.{name}", f"SNA {name}"
    asked = f"GET {url}/api/v1/health"
    if found.well:
        took = format_duration(found.took)
        return ok(id_, title, f"{asked}: {found.status} after {took}")
    by_hand = f"curl -v {url}/api/v1/health"
    if found.status in (401, 403):
        fix = f"see to `snas: {{{name}: {{token: …}}}}`"
        return failed(id_, title, f"{asked}: {found.status}, so it speaks and does not let us", fix)
    if found.status is not None:
        return failed(id_, title, f"{asked}: {found.status}, so something else, or an SNA that is "
                      "not well, answers there", by_hand)  # fmt: skip
    if found.kind == "refused":
        said = f"{asked}: connection refused: nobody listens there, so the tunnel is down"
        return failed(id_, title, said, "start the tunnel at the appliance; then: " + by_hand)
    if found.kind == "closed":
        said = (
            f"{asked}: accepted, then closed without an answer: a tunnel with nothing behind it, "
            "or an appliance that died"
        )
        return failed(id_, title, said, "start the SNA behind the tunnel; then: " + by_hand)
    if found.kind in ("connect", "timeout"):
        said = f"{asked}: {found.said}: the tunnel or the appliance hangs"
        return failed(id_, title, said, by_hand)
    return failed(id_, title, f"{asked}: {found.said}", by_hand)


def secret(what: str, where: str, error: str) -> Check:
    """Whether the secret of `what` (`vcenter vc1`) can be read, `where` it is kept."""
    id_, title = f"secrets.{what.replace(' ', '.')}", f"secret of {what}"
    if not error:
        return ok(id_, title, f"{where} can be read")
    if where.startswith("credential"):
        return unknown(
            id_,
            title,
            f"{where}: only a service that systemd started has it",
            "reconciler render systemd names the file under /etc/reconciler/credentials",
        )
    fix = f"see to it: {where}"
    if where.startswith("age "):
        fix = "see to `secrets: {age_identity: …}`; to encrypt it anew: reconciler secret encrypt"
    if where.startswith("file "):
        path = where.removeprefix("file ")
        fix = f"ls -la {path}"
        if "No such file" in error:
            fix = f"(umask 077; cat > {path})    and type it, then Ctrl-D"
    elif where.startswith("env "):
        fix = f"set {where.removeprefix('env ')} where reconciler is started"
    return failed(id_, title, error, fix)


def listening(address: str, why_not: str, ours: str, holder: str, accepted: int = 0) -> Check:
    """Whether callbacks can be taken. `ours`: the process of this hub that has the address.
    `accepted`: runs whose callbacks are to come."""
    id_, title = "api", "callbacks"
    if ours:
        return ok(id_, title, f"{address}: held by {ours}, which is ours")
    if not why_not and accepted:
        runs = f"{accepted} accepted runs are" if accepted > 1 else "an accepted run is"
        said = f"{address}: nobody listens, and what {runs} to report is lost"
        return warning(id_, title, said, "reconciler watch (or reconciler serve)")
    if not why_not:
        return ok(id_, title, f"{address}: free")
    if "(pid 1)" in holder:
        said = f"{address}: held by systemd, for its socket unit of reconciler or for another"
        return unknown(id_, title, said, "systemctl list-sockets")
    if "unknown process" in holder:
        said = f"{address}: {holder} has it, and whose that is is not ours to see"
        return unknown(id_, title, said, "run this as root")
    who = f": {holder} has it" if holder else f": {why_not}"
    fix = "end that, or set `api: {listen: 127.0.0.1:PORT}` (and the tunnel's -L for it)"
    return failed(id_, title, f"{address}{who}", fix)


def access(
    listen: Endpoint, tokens: Sequence[str], callbacks_closed: bool, tls: bool, problem: str
) -> Check:
    """Who may use the API. `problem`: why the certificate, the group or a token cannot be used;
    then the daemon does not begin."""
    id_, title = "api.access", "who may use the API"
    if problem:
        fix = "see to `api: {tls: …, group: …, tokens: …}` in the config, and to what it names"
        return failed(id_, title, problem, fix)
    said = sentence(
        loopback=listen.loopback, tokens=bool(tokens), callbacks_closed=callbacks_closed
    )
    known = f"tokens: {', '.join(tokens)}" if tokens else ""
    words = "; ".join(filter(None, (known, "by TLS" if tls else "", said)))
    return ok(id_, title, words)


def inventory(
    where: str, required: bool, errors: Sequence[str], vms: int | None, disks: int
) -> Check:
    """Whether the list of all disks can be read. `vms` None: it cannot."""
    id_, title = "inventory", "inventory"
    if not where:
        if required:
            said = "`inventory: {required: true}`, and none is named: no backup is made"
            return failed(id_, title, said, "write `inventory: {file: inventory.yaml}`")
        said = "none is named: no list of disks can be confirmed (DisksUnverified)"
        return warning(id_, title, said, "write `inventory: {file: inventory.yaml}`")
    if errors or vms is None:
        first = errors[0] if errors else f"{where} cannot be read"
        more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
        return failed(id_, title, f"{first}{more}", "reconciler validate")
    some = f"{vms} VM{'s' if vms != 1 else ''}, {disks} disk{'s' if disks != 1 else ''}"
    if not vms:  # of a file: such an answer of a database is not believed
        return warning(id_, title, f"{where}: {some}", f"write its VMs into {where}")
    return ok(id_, title, f"{where}: {some}")


# -- the machine


class Clock(Struct, frozen=True, kw_only=True):
    """What is known of the clock."""

    now: Seconds
    synchronised: bool | None
    """None: nobody says."""
    container: str = ""
    """What tells that this is a container; empty: nothing does."""


SKEW: Final[Seconds] = 2.0
"""What a clock that is corrected may step back by."""
BORN: Final[Seconds] = 1_735_689_600.0
"""2025-01-01, before this program: a clock that says less was never set."""


def clock(found: Clock, newest: Seconds) -> Check:
    """`newest`: when anything was last written down; 0: nothing was."""
    id_, title = "clock", "clock"
    says = stamp(found.now)
    if found.now < BORN:
        return failed(id_, title, f"{says}: it was never set", "timedatectl set-ntp true")
    if newest > found.now + SKEW:
        ahead = format_duration(newest - found.now)
        said = f"{says}, {ahead} before the newest thing written in the store"
        return failed(id_, title, said, "set it right: timedatectl; date")
    if found.synchronised:
        return ok(id_, title, f"{says}, kept by NTP")
    if found.synchronised is None or found.container:
        why = f" from within a container ({found.container})" if found.container else ""
        return unknown(id_, title, f"{says}; whether NTP keeps it cannot be told{why}")
    return warning(
        id_,
        title,
        f"{says}; the kernel says that nobody keeps it right (STA_UNSYNC)",
        "timedatectl set-ntp true, or install chrony",
    )


class Limits(Struct, frozen=True, kw_only=True):
    """What a process and those that it starts may take. None: no limit, or not told."""

    files: int | None = None
    """Open descriptors of one process."""
    processes: int | None = None
    """Threads of one user."""
    tasks: int | None = None
    """Threads of the control group."""
    pid_max: int | None = None
    threads_max: int | None = None
    """Threads of the whole machine."""
    watches: int | None = None
    instances: int | None = None
    """Of inotify, per user."""


def limits(found: Limits, exports: int, whose: str, watch: str) -> Iterator[Check]:
    """For so many exports at once. `watch`: why a directory cannot be watched; empty: it can."""
    files = files_for(exports)
    title = "open files"
    if found.files is not None and found.files < files:
        said = f"{whose} may have {found.files}, and {exports} exports need {files}"
        yield failed("limits.files", title, said, more_files(exports))
    else:
        most = "any number" if found.files is None else str(found.files)
        said = f"{whose} may have {most}; {exports} exports need {files}"
        yield ok("limits.files", title, said)
    tasks = IDLE_TASKS + TASKS * exports
    title = "threads"
    known = [one for one in _threads(found, tasks) if one[1] is not None]
    for id_, most_threads, what, fix in known:
        if most_threads is not None and most_threads < tasks:
            said = (
                f"{what} of {whose} is {most_threads}, and {exports} exports that are all written "
                f"at once take {tasks}"
            )
            yield warning(id_, title, said, fix)
    least = min((one[1] or 0 for one in known), default=None)
    if least is None:
        yield unknown("limits.tasks", title, "nothing tells how many there may be")
    elif least >= tasks:
        said = f"{whose} may have {least}; {exports} exports that are all written take {tasks}"
        yield ok("limits.tasks", title, said)
    yield _watching(found, watch)


def _threads(found: Limits, tasks: int) -> list[tuple[str, int | None, str, str]]:
    """(id, the most, what says so, fix) of all that limits threads."""
    group = "TasksMax=infinity in the unit; of a container: --pids-limit -1"
    machine = f"sysctl -w kernel.threads-max={tasks * 4}"
    return [
        ("limits.tasks", found.tasks, "the control group's pids.max", group),
        ("limits.processes", found.processes, "RLIMIT_NPROC", f"ulimit -u {tasks * 2}"),
        ("limits.pids", found.pid_max, "kernel.pid_max", "sysctl -w kernel.pid_max=4194304"),
        ("limits.threads", found.threads_max, "kernel.threads-max", machine),
    ]


def _watching(found: Limits, watch: str) -> Check:
    id_, title = "limits.inotify", "watching directories"
    more = "sysctl -w fs.inotify.max_user_watches=524288"
    if watch:
        return failed(id_, title, watch, f"{more} fs.inotify.max_user_instances=1024")
    if found.watches is not None and found.watches < WATCHES:
        said = f"{found.watches} at most (fs.inotify.max_user_watches), and each is one"
        return warning(id_, title, said, more)
    most = f"; {found.watches} of them at most, for all of this user" if found.watches else ""
    return ok(id_, title, f"a trial watch works{most}")


class Confinement(Struct, frozen=True, kw_only=True):
    """What keeps qemu-nbd from what it may do by its user's rights."""

    selinux: str = ""
    """`enforcing`, `permissive`; empty: not on."""
    apparmor: bool = False
    label: str | None = None
    """What the trial server ran under; None: there was none."""
    denied: Sequence[str] = ()
    """Lines of logs about qemu's programs."""
    unread: Sequence[str] = ()
    """Logs that could not be read, and why."""


def confinement(found: Confinement) -> Check:
    """Whether AppArmor or SELinux stand in the way."""
    id_, title = "confinement", "AppArmor and SELinux"
    on = [f"SELinux {found.selinux}"] if found.selinux else []
    on += ["AppArmor on"] if found.apparmor else []
    if not on:
        return ok(id_, title, "neither is on")
    if found.label is None:
        on.append("what a server runs under was not tried")
    elif found.label in ("", "unconfined") or "unconfined" in found.label:
        on.append("the trial server ran unconfined")
    else:
        on.append(f"the trial server ran under {found.label}")
    unread = f"; not readable: {', '.join(found.unread)}" if found.unread else ""
    if found.denied:
        said = f"{', '.join(on)}; denied lately: {found.denied[-1].strip()[:300]}"
        fix = "allow qemu-nbd the repositories: aa-status, or: ausearch -m avc -ts recent"
        return warning(id_, title, said, fix)
    if found.unread:
        said = f"{', '.join(on)}; whether anything was denied cannot be told{unread}"
        return unknown(id_, title, said)
    return ok(id_, title, f"{', '.join(on)}; nothing was denied to qemu's programs lately")


def daemon(holder: str, answers: bool, unit: str, trouble: str) -> Check:
    """`holder`: who holds the hub, in words. `answers`: it takes work over its socket."""
    id_, title = "daemon", "daemon"
    if trouble:
        return warning(id_, title, trouble, "run this as the daemon's user, or as root")
    if answers:
        of = f", unit {unit}" if unit else ", not a systemd service"
        return ok(id_, title, f"running: {holder or 'a daemon'}{of}")
    if holder:
        return ok(id_, title, f"none; another command is at work: {holder}")
    return ok(id_, title, "not running: nothing is healed by itself until `reconciler watch` is")
