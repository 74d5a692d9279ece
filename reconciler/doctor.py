"""Look at and try what a hub needs; changes nothing that stays, takes no lock.

Each group of checks has a deadline, and the groups go side by side: storage or an appliance that
hangs costs a line, not the command.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from msgspec.structs import replace

from reconciler import tunnel_doctor
from reconciler.core import doctor
from reconciler.core.access import key as token
from reconciler.core.access import keyring
from reconciler.core.actual import Handshake, Listener
from reconciler.core.appliances import Health
from reconciler.core.desired import Export
from reconciler.core.doctor import (
    Check,
    Confinement,
    Ports,
    Remembered,
    Served,
    Storage,
    failed,
    ok,
)
from reconciler.core.errors import ConfigError, HostError, ReconcilerError
from reconciler.core.mark import argv, parse
from reconciler.core.settings import MIN_FREE, Secret, SecretRef, Settings
from reconciler.core.units import Port, Seconds
from reconciler.handover import NAME as CONTROL
from reconciler.handover import found as daemon_of
from reconciler.host import (
    files,
    images,
    lock,
    machine,
    nbd,
    patience,
    proc,
    processes,
    qemu_nbd,
    sockets,
    tls,
    trial,
)
from reconciler.host.store import NAME as STORE
from reconciler.host.store import copies, newest_events
from reconciler.look import Observer

if TYPE_CHECKING:
    from reconciler.core.inventory import Inventory

DEADLINE: Final[Seconds] = 25.0
"""For all groups together. Storage that hangs is given up after `patience.QUIET`, an SNA after its
`connect_timeout` and 5 s; the rest takes a second."""
TRIES: Final[Seconds] = 10.0
"""For writing into one directory."""
LOOPBACK: Final = "127.0.0.1"
"""Where the trial server listens, wherever exports do: it is nobody else's business."""
SIZE: Final = 1 << 20
"""Bytes of the image that is served as a trial."""
TRIAL: Final = "nbd-reconciler doctor"
"""How the description of a trial server begins: no hub's mark, so no hub takes it for its own."""
FOLDER: Final = ".reconciler-doctor-"
"""How the name of a folder for the trial begins."""
LEAST: Final = (3, 11)
"""Source: requires-python in pyproject.toml."""
DIRECT: Final = ("none", "directsync")
"""Values of `cache` that go past the page cache. Source: qemu-nbd(8)."""
DISTRIBUTION: Final = "nbd-reconciler"


T = TypeVar("T")


class Doctor:
    """Checks one hub. `settings` None: its config cannot be read, and `trouble` says why. `specs`:
    where tunnels may be declared, beside where specs usually are."""

    def __init__(
        self,
        settings: Settings | None,
        environment: Mapping[str, str],
        *,
        config: str | None = None,
        trouble: ConfigError | None = None,
        specs: Sequence[str] = (),
    ) -> None:
        self.known = settings is not None
        self.settings = settings or Settings(hub="", state="", repositories={})
        self.environment = environment
        self.config, self.trouble, self.specs = config, trouble, specs
        self.user = _user()
        self._label: str | None = None
        self._tried = threading.Event()
        """The trial server has been, or will never be."""
        self._once = threading.RLock()
        """For what several groups need, and is looked at once."""

    def checks(self, only: Collection[str] = doctor.GROUPS) -> list[Check]:
        """Every check of some groups, by group. Ends in bounded time, whatever hangs."""
        groups: dict[str, Callable[[], Iterable[Check]]] = {
            "config": self._config,
            "python": self._python,
            "qemu": self._qemu,
            "ports": self._ports,
            "repository": self._repositories,
            "state": self._state,
            "sna": self._snas,
            "tunnel": self._tunnels,
            "secrets": self._secrets,
            "api": self._api,
            "inventory": lambda: [self._listed()[0]],
            "clock": self._clock,
            "limits": self._limits,
            "confinement": self._confinement,
            "daemon": self._daemon,
        }
        can = doctor.GROUPS if self.known else doctor.WITHOUT_CONFIG
        wanted = {name: groups[name] for name in groups if name in only and name in can}
        if "qemu" not in wanted:
            self._tried.set()
        try:
            return doctor.ordered(side_by_side(wanted, DEADLINE))
        finally:
            self._tried.wait(TRIES)  # also when a signal ends us: what was begun is cleared away

    @cached_property
    def holder(self) -> lock.Holder | None:
        """Who holds the hub's lock; also None where that storage gives no answer."""
        directory = self.settings.state
        with self._once, contextlib.suppress(HostError):
            if self.known:
                return asked(directory, lambda: lock.holder(Path(directory) / "lock"))
        return None

    # -- what runs it

    def _config(self) -> Iterator[Check]:
        title = "configuration"
        where = self.config or "none: the built-in defaults"
        if self.trouble is None:
            yield ok("config", title, where)
            return
        first, *rest = self.trouble.diagnostics
        more = f"; and {len(rest)} more" if rest else ""
        left = ", ".join(one for one in doctor.GROUPS if one not in doctor.WITHOUT_CONFIG)
        said = f"{first}{more}; not tried without it: {left}; the rest by the built-in defaults"
        yield failed("config", title, said, "correct it, then: reconciler validate")

    def _python(self) -> Iterator[Check]:
        libraries = {}
        try:
            needed = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            needed = []  # run from its source
        for name, oldest in filter(None, map(doctor.requirement, needed)):
            try:
                libraries[name] = (metadata.version(name), oldest)
            except metadata.PackageNotFoundError:
                libraries[name] = ("", oldest)
        yield doctor.runtime(sys.version_info[:3], LEAST, libraries)

    # -- qemu

    def _qemu(self) -> Iterator[Check]:
        try:
            yield from self._binaries()
        finally:
            self._tried.set()

    def _binaries(self) -> Iterator[Check]:
        title = "qemu-nbd"
        installs = "apt-get install qemu-utils"
        try:
            binary = qemu_nbd.find(self.settings.qemu_nbd.binary)
        except HostError as error:
            yield failed("qemu.nbd", title, str(error), installs)
            return
        code, said = machine.program([binary, "--version"], 5.0)
        if code:
            yield failed("qemu.nbd", title, f"{binary} --version: {said or code}", installs)
            return
        said = said or "it does not say which version"
        yield ok("qemu.nbd", title, f"{binary}, {said.splitlines()[0].removeprefix(f'{binary} ')}")
        title = "qemu-img"
        with self._folder() as folder:
            _sweep(posixpath.dirname(folder))
            image = posixpath.join(folder, "trial.qcow2")
            try:
                images.create(image, SIZE, folder)
                damage = images.check(image)
            except HostError as error:
                yield failed("qemu.img", title, str(error), installs)
                return
            if damage:
                yield failed("qemu.img", title, f"a new image is damaged: {damage}", installs)
                return
            yield ok("qemu.img", title, "create and check work")
            yield from doctor.serving(self._served(binary, image, folder), self.settings.qemu_nbd)

    def _served(self, binary: str, image: str, folder: str) -> Served:
        """Serve an image by the way that exports go, ask it, and end it."""
        options = self.settings.qemu_nbd
        port, listener = self._socket()
        export = Export(
            vm="doctor", key=0, position=0, run="trial", attempt=1, name="doctor-disk0",
            image=image, size=SIZE,
        )  # fmt: skip
        line = list(argv(export, port, "doctor", options))
        line[line.index("--description") + 1] = _description()
        chosen = ("cache", "aio", "discard", "detect_zeroes")
        given = [
            f"--{one.replace('_', '-')}={value}"
            for one in chosen
            if (value := getattr(options, one))
        ]
        found = Served(options=" ".join([*given, f"--shared={options.shared}"]))
        log = Path(folder) / "log"
        begun = time.monotonic()
        try:
            pid = qemu_nbd.spawn(binary, line, listener, log)
        except HostError as error:
            listener.close()
            return replace(found, failed=str(error))
        try:
            pidfd = os.pidfd_open(pid)  # our child, not reaped: the pid cannot be another's
            try:
                target = nbd.Target(LOOPBACK, port, export.name, pidfd)
                answer = nbd.handshake([target], min(options.start_timeout, TRIES))[0]
            finally:
                os.close(pidfd)
            found = replace(found, took=time.monotonic() - begun, elsewhere=_elsewhere(pid))
            self._label = machine.label(pid)
            wrong = self._wrong(answer)
        finally:
            listener.close()
            left = _ended(pid, options.stop_grace)
        words = qemu_nbd.last_words(log).removeprefix("qemu-nbd: ")
        wrong = f"{wrong}; qemu-nbd said: {words}" if wrong and words else wrong
        return replace(found, failed=wrong, left=left)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """A directory of ours, gone at the end; with O_DIRECT, if servers are to use that."""
        direct = self.settings.qemu_nbd.cache in DIRECT
        good = tempfile.gettempdir()
        for place in (good, "/var/tmp", self.settings.state) if direct else ():  # noqa: S108
            with contextlib.suppress(HostError):
                tried = asked(place, partial(trial.attempt, place, direct=True), TRIES)
                if not (tried.failed or tried.direct):
                    good = place
                    break
        folder = tempfile.mkdtemp(prefix=f"{FOLDER}{'-'.join(_ourselves())}-", dir=good)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _socket(self) -> tuple[Port, sockets.Bound]:
        """Any port but one of the range, which an export may want at this moment."""
        passed = []
        try:
            while True:
                listener = sockets.listening(LOOPBACK, 0, "ports: {bind: …}")
                port = listener.getsockname()[1]
                if port not in self.settings.ports:
                    return port, listener
                passed.append(listener)
        finally:
            for one in passed:
                one.close()

    def _wrong(self, answer: Handshake) -> str:
        if not answer.answered:
            return answer.error
        if answer.size != SIZE:
            return f"it exports {answer.size} bytes of an image of {SIZE}"
        if not answer.description.startswith(TRIAL):
            return f"it describes itself as {answer.description!r}, not as it was told to"
        return ""

    # -- ports

    def _ports(self) -> Iterator[Check]:
        settings = self.settings
        seen = proc.tcp_sockets(established=False)
        told: set[Port] = set()
        held: set[int] = set()
        for process in proc.processes():
            served = parse(process.argv)
            if served and served.mark and served.mark.hub == settings.hub:
                inodes = proc.socket_inodes(process.identity.pid)
                held |= inodes
                # Another user's descriptors are not ours to see: then its mark must do.
                told |= set() if inodes else {served.mark.port}
        if self.holder:
            held |= proc.socket_inodes(self.holder.pid)  # a daemon keeps its servers' sockets
        listening = [one for one in seen if one.listening and one.port in settings.ports]
        ours = {one.port for one in listening if one.inode in held or one.port in told}
        busy = {
            port: why for port in settings.ports if (why := machine.bindable(settings.bind, port))
        }
        others = {one.port: one for one in listening if one.port in busy and one.port not in ours}
        names = proc.holders(one.inode for one in others.values())
        strangers = [_listener(one, names.get(one.inode)) for one in others.values()]
        rest = {p: why for p, why in busy.items() if p not in ours and p not in others}
        _, disks, largest = self._listed()
        yield from doctor.ports(
            Ports(
                range=settings.ports,
                bind=settings.bind,
                ours=len(ours & busy.keys()),
                strangers=strangers,
                unbindable=_connected(rest),
                ephemeral=_pair(machine.sysctl("net.ipv4.ip_local_port_range")),
                reserved=machine.sysctl("net.ipv4.ip_local_reserved_ports"),
                disks=disks,
                largest=largest,
            )
        )

    # -- storage

    def _storage(self, path: str, *, direct: bool = False) -> Storage:
        """Look at a directory and try to write into it; one that hangs is given up."""
        mount = patience.mount_of(os.path.abspath(path))
        try:
            room = asked(path, lambda: trial.room(path))
            tried = None
            if room.exists and room.directory and not room.error and not room.read_only:
                tried = asked(path, lambda: trial.attempt(path, direct=direct), TRIES)
        except HostError as error:
            return Storage(path=path, hangs=str(error), mount=mount)
        if room.exists and room.real:
            mount = patience.mount_of(room.real)
        return Storage(path=path, room=room, mount=mount, trial=tried)

    def _repositories(self) -> Iterator[Check]:
        settings = self.settings
        tries = {name: partial(self._repository, name) for name in settings.repositories}
        yield from side_by_side(tries, DEADLINE - 1, "repository")

    def _repository(self, name: str) -> Iterator[Check]:
        root, direct = self.settings.repositories[name], self.settings.qemu_nbd.cache in DIRECT
        yield from doctor.repository(
            name,
            self._storage(root, direct=direct),
            min_free=self.settings.min_free.get(name, MIN_FREE),
            direct=direct,
            user=self.user,
        )

    def _state(self) -> Iterator[Check]:
        directory = self.settings.state
        found = self._storage(directory)
        remembered = Remembered()
        if found.room and found.room.exists and not found.hangs:
            try:
                remembered = asked(directory, self._remembered, TRIES)
            except HostError as error:
                remembered = Remembered(error=str(error))
        yield from doctor.state(
            found,
            remembered,
            hub=self.settings.hub,
            uid=os.geteuid(),
            user=self.user,
            holder=asked(directory, self._held) if found.room and not found.hangs else None,
        )

    def _held(self) -> str | None:
        """Who holds the lock, in words; None: whether anybody does is not ours to see."""
        path = Path(self.settings.state) / "lock"
        seen = os.access(path.parent, os.X_OK) and (not path.exists() or os.access(path, os.R_OK))
        return str(self.holder or "") if seen else None

    def _remembered(self) -> Remembered:
        with self._once:
            return self._memory

    @cached_property
    def _memory(self) -> Remembered:
        directory = Path(self.settings.state)
        facts = copies.facts(directory / STORE)
        if facts is None:
            return Remembered()
        events = newest_events(directory, limit=1)
        return Remembered(
            exists=True,
            hub=facts.hub,
            wrong=facts.wrong,
            calls=sum(facts.calls.values()),
            accepted=sum(facts.calls.get(state, 0) for state in ("ACCEPTED", "UNKNOWN")),
            newest=max(facts.newest, events[-1].last if events else 0.0),
        )

    # -- what is outside

    def _snas(self) -> Iterator[Check]:
        tries = {name: partial(self._appliance, name) for name in self.settings.snas}
        yield from side_by_side(tries, DEADLINE - 1, "sna")
        if not tries:
            said = "none is named: no backup can be called"
            fix = 'write `snas: {site-a: {url: "http://127.0.0.1:9081"}}`'
            yield doctor.warning("sna", "SNA", said, fix)

    def _appliance(self, name: str) -> Iterator[Check]:
        url = self.settings.snas[name].url
        try:
            with Observer(self.settings, self.environment).line(name) as line:
                yield doctor.appliance(name, url, line.health())
        except HostError as error:  # its token; the group of secrets says what helps
            yield failed(f"sna.{name}", f"SNA {name}", f"not asked: {error}", "see to its token")

    def _tunnels(self) -> Iterator[Check]:
        def health(name: str) -> Health:
            with Observer(self.settings, self.environment).line(name) as line:
                return line.health()

        known = tunnel_doctor.Known()
        try:
            look = partial(tunnel_doctor.known, self.settings, self.specs)
            known = asked(self.settings.state, look, TRIES)
        except HostError as error:
            said = f"which tunnels were applied or declared: {error}"
            yield doctor.unknown("tunnel.declared", "tunnels declared", said)
        yield from tunnel_doctor.checks(self.settings, self.environment, known, health)

    def _secrets(self) -> Iterator[Check]:
        for what, ref in self._references():
            error = ""
            try:
                found = self._secret(ref)
                if what.startswith("api "):
                    token(what, found.reveal(), ())
            except (HostError, ValueError) as wrong:
                error = str(wrong)
            yield doctor.secret(what, str(ref), error)

    def _secret(self, ref: SecretRef) -> Secret:
        """Raises HostError, also where its storage hangs."""
        read = partial(files.secret, ref, self.environment)
        kept = ref.identity or ref
        near = posixpath.dirname(kept.name) if kept.kind == "file" else ""
        return asked(near, read) if near else read()

    def _references(self) -> Iterator[tuple[str, SecretRef]]:
        settings = self.settings
        for name, vcenter in settings.vcenters.items():
            yield f"vcenter {name}", vcenter.password
        for name, sna in settings.snas.items():
            if sna.token:
                yield f"sna {name}", sna.token
        sql = settings.inventory_sql
        for name, ref in (
            ("inventory", sql.password if sql else None),
            ("git key", settings.git.key),
            ("git token", settings.git.token),
            ("notify", settings.notify.secret),
        ):
            if ref:
                yield name, ref
        for one in settings.api.tokens:
            yield f"api {one.name}", one.secret

    def _api(self) -> Iterator[Check]:
        yield self._access()
        listen = self.settings.listen
        host = "127.0.0.1" if listen.host == "localhost" else listen.host
        why_not = machine.bindable(host, listen.port)
        ours = holder = ""
        if why_not:
            seen = proc.tcp_sockets(established=False)
            there = [one for one in seen if one.listening and one.port == listen.port]
            names = {**proc.holders(one.inode for one in there), **self._kept()}
            for one in there:
                who = str(_listener(one, names.get(one.inode)))
                if one.inode in self._kept():
                    ours = who
                holder = holder or who
        hidden = [pid for pid in self._keepers() if not proc.socket_inodes(pid)]
        if why_not and not ours and hidden:
            said = f"{listen}: held, and what pid {hidden[0]} of this hub has is not ours to see"
            yield doctor.unknown("api", "callbacks", said, "run this as its user, or as root")
            return
        accepted = 0
        if not why_not:
            with contextlib.suppress(ReconcilerError):  # the store has a check of its own
                accepted = asked(self.settings.state, self._remembered).accepted
        yield doctor.listening(str(listen), why_not, ours, holder, accepted)

    def _access(self) -> Check:
        api = self.settings.api
        problem = ""
        try:
            if api.tls:
                tls.context(api.tls)
            if api.group:
                sockets.gid(api.group)
            keyring(api.tokens, [self._secret(one.secret).reveal() for one in api.tokens])
        except HostError as error:
            problem = str(error)
        return doctor.access(
            self.settings.listen,
            [token.name for token in api.tokens],
            api.callbacks_closed,
            bool(api.tls),
            problem,
        )

    def _kept(self) -> dict[int, int]:
        """The sockets of the processes of this hub that take callbacks, known by their locks."""
        return {inode: pid for pid in self._keepers() for inode in proc.socket_inodes(pid)}

    def _keepers(self) -> list[int]:
        return [one.pid for one in (self.holder, asked(self.settings.state, self._server)) if one]

    def _server(self) -> lock.Holder | None:
        return lock.holder(Path(self.settings.state) / "serve.lock")

    def _listed(self) -> tuple[Check, int | None, tuple[str, int] | None]:
        """The inventory: its check, how many disks it has, and the VM with the most."""
        with self._once:
            return self._inventory

    @cached_property
    def _inventory(self) -> tuple[Check, int | None, tuple[str, int] | None]:
        sql, required = self.settings.inventory_sql, self.settings.inventory_required
        where = sql.origin if sql else self.settings.inventory or ""
        if not where:
            return doctor.inventory("", required, (), None, 0), None, None
        known, wrong = listed(self.settings)
        if known is None:
            return doctor.inventory(where, required, wrong, None, 0), None, None
        sizes = {name: len(vm.disks) for name, vm in known.vms.items()}
        largest = max(sizes.items(), key=lambda item: item[1], default=None)
        disks = sum(sizes.values())
        return doctor.inventory(where, required, wrong, len(sizes), disks), disks, largest

    # -- the machine

    def _clock(self) -> Iterator[Check]:
        newest = 0.0
        if self.known:
            with contextlib.suppress(ReconcilerError):
                newest = asked(self.settings.state, self._remembered, TRIES).newest
        yield doctor.clock(machine.clock(), newest)

    def _limits(self) -> Iterator[Check]:
        pid, whose = os.getpid(), "a process of this shell"
        if self.holder and asked(self.settings.state, self._takes_work):
            pid, whose = self.holder.pid, f"the daemon (pid {self.holder.pid})"
        watch = ""
        from reconciler.host.watching import Watch

        try:
            eyes = Watch()
            try:
                eyes.arm([os.getcwd()])
            finally:
                eyes.close()
        except HostError as error:
            watch = str(error)
        exports = len(self.settings.ports)
        yield from doctor.limits(machine.limits(pid), exports, whose, watch)

    def _takes_work(self) -> bool:
        """Who holds the hub is a daemon."""
        return (Path(self.settings.state) / CONTROL).exists()

    def _confinement(self) -> Iterator[Check]:
        self._tried.wait(TRIES + 5)
        selinux, apparmor = machine.selinux(), machine.apparmor()
        denied, unread = machine.denials() if selinux or apparmor else ([], [])
        yield doctor.confinement(
            Confinement(
                selinux=selinux,
                apparmor=apparmor,
                label=self._label,
                denied=denied,
                unread=unread,
            )
        )

    def _daemon(self) -> Iterator[Check]:
        answers, trouble = False, ""
        try:
            asked(self.settings.state, lambda: None)  # or the way to its socket would hang
        except HostError as error:
            yield doctor.unknown("daemon", "daemon", str(error))
            return
        try:
            if line := daemon_of(Path(self.settings.state)):
                answers = True
                line.close()
        except ReconcilerError as error:
            trouble = str(error)
        unit = machine.unit(self.holder.pid) if self.holder else ""
        yield doctor.daemon(str(self.holder or ""), answers, unit, trouble)


def listed(settings: Settings) -> tuple[Inventory | None, list[str]]:
    """The inventory, if one is named and can be read; and what is wrong with it."""
    from reconciler.inventories import reader_of

    where = settings.inventory
    read = reader_of(settings).read
    try:
        answer = asked(posixpath.dirname(where), read) if where else read()
    except HostError as error:
        return None, [str(error)]
    known = None if answer.error else answer.inventory
    return known, [one.summary if not one.place else str(one) for one in answer.diagnostics]


def side_by_side(
    groups: Mapping[str, Callable[[], Iterable[Check]]], deadline: Seconds, base: str = ""
) -> list[Check]:
    """What all of them find; one that does not end, or breaks, is a line of its own.

    The threads are daemons: they keep no process from ending.
    """
    found: dict[str, Sequence[Check]] = {}

    def run(name: str, group: Callable[[], Iterable[Check]]) -> None:
        id_ = f"{base}.{name}" if base else name
        checks: list[Check] = []
        found[name] = checks
        try:
            checks.extend(group())
        except ReconcilerError as error:
            checks.append(failed(id_, name, str(error), "see what it says"))
        except OSError as error:
            said = f"cannot look: {error.strerror or error}"
            checks.append(failed(id_, name, said, f"ls -la {error.filename or '.'}"))
        except Exception as error:  # the other groups have their say all the same
            said = f"this check is broken: {type(error).__name__}: {error}"
            checks.append(failed(id_, name, said, "report this as a bug"))

    threads = {
        name: threading.Thread(target=run, args=(name, group), name=f"check {name}", daemon=True)
        for name, group in groups.items()
    }
    last = time.monotonic() + deadline
    for thread in threads.values():
        thread.start()
    checks: list[Check] = []
    for name, thread in threads.items():
        thread.join(max(0.0, last - time.monotonic()))
        checks += list(found.get(name, ()))
        if thread.is_alive():
            id_ = f"{base}.{name}" if base else name
            said = f"no answer within {deadline:g} s"
            checks.append(failed(id_, name, said, "see what hangs: dmesg; findmnt"))
    return checks


def asked(root: str, question: Callable[[], T], deadline: Seconds = patience.QUIET) -> T:
    """What storage answers to a question. Raises HostError where it gives no answer in time.

    It is touched first, by a process that can be left behind.
    """
    if root not in patience.touched([root]):
        raise HostError(f"{patience.silence(root)} within {patience.QUIET:g} s", "StorageHangs")
    return patience.do("look", root, question, deadline)


def _description() -> str:
    """What our trial server says of itself: no hub's mark, and whose it is."""
    return f"{TRIAL} {' '.join(_ourselves())}"


def _ourselves() -> tuple[str, str, str]:
    """Pid, start time and the namespace in which these mean something; see pid_namespaces(7)."""
    me = proc.identify(os.getpid())
    assert me is not None
    return str(me.pid), str(me.started), str(_namespace())


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _orphaned(words: Sequence[str]) -> bool:
    """Whether something that says so of itself is of a doctor that is gone."""
    if len(words) != 3 or not words[0].isdigit() or words[2] != str(_namespace()):
        return False
    whose = proc.identify(int(words[0]))
    return whose is None or str(whose.started) != words[1]


def _sweep(place: str) -> None:
    """End and remove what doctors left that were killed in the middle: servers, and folders of ours
    in a directory. Both say whose they were."""
    for process in proc.processes(TRIAL.encode()):
        line = process.argv
        where = line.index("--description") + 1 if "--description" in line[:-1] else 0
        said = line[where]
        if not said.startswith(TRIAL) or not _orphaned(said.removeprefix(TRIAL).split()):
            continue
        with (
            contextlib.suppress(HostError),
            processes.Handle(process.identity, proc.identify) as it,
        ):
            it.end(TRIES)
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            words = entry.name.removeprefix(FOLDER).split("-")[:3]
            if not entry.name.startswith(FOLDER) or not _orphaned(words):
                continue
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                shutil.rmtree(entry.path, ignore_errors=True)


def _elsewhere(pid: int) -> str:
    """Where a server listens besides its own socket, at descriptor 3; empty: nowhere."""
    held = proc.socket_inodes(pid) - {proc.listener_inode(pid)}
    for one in proc.tcp_sockets(established=False) if held else ():
        if one.inode in held:
            return f"{one.address}:{one.port}"
    return ""


def _ended(pid: int, grace: Seconds) -> str:
    """End our trial server; what could not be."""
    try:
        if identity := proc.identify(pid):
            with processes.Handle(identity, proc.identify) as handle:
                handle.end(grace)
    except processes.Gone:
        pass
    except HostError as error:
        return str(error)
    finally:
        processes.reap(pid)
    return ""


def _listener(one: proc.Socket, pid: int | None) -> Listener:
    return Listener(one.port, one.address, pid, proc.name_of(pid) if pid else "")


def _connected(busy: Mapping[Port, str]) -> dict[Port, str]:
    """Who has ports that nobody listens on: connections that go out of them."""
    out = {one.port: one for one in proc.tcp_sockets() if not one.listening} if busy else {}
    names = proc.holders(one.inode for port, one in out.items() if port in busy)
    found = {}
    for port, why in busy.items():
        pid = names.get(out[port].inode) if port in out else None
        who = f"{proc.name_of(pid)} (pid {pid})" if pid else "somebody"
        found[port] = f"{why}: a connection of {who} goes out of it" if port in out else why
    return found


def _pair(text: str) -> tuple[Port, Port] | None:
    words = text.split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def _user() -> str:
    import pwd  # late: only for the words of a fix

    with contextlib.suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())
