"""One look at the hub: processes, sockets, handshakes, images, claims; light enough for status."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from msgspec.structs import replace

from reconciler import reaching, repositories
from reconciler.core.actual import Actual, Foreign, Handshake, Identity, Listener, Server
from reconciler.core.appliances import Health, needed
from reconciler.core.call import Call, CallState, Report
from reconciler.core.call_plan import silent
from reconciler.core.desired import Desired, Export
from reconciler.core.errors import HostError
from reconciler.core.ledger import Ledger
from reconciler.core.mark import READER, Served, parse
from reconciler.core.settings import Secret, Settings
from reconciler.core.tunnel_seen import Ssh, TunnelSeen
from reconciler.core.units import Port, Seconds
from reconciler.host import lock, nbd, proc
from reconciler.host.images import Owner
from reconciler.host.store import NAME as STORE
from reconciler.host.store import StoreError, state_id_of

if TYPE_CHECKING:
    from reconciler.host.sna import Line

HANDSHAKE: Final[Seconds] = 3.0
"""Deadline of a look at a running server. One that is well answers in under 1 ms."""
PROBE: Final[Seconds] = 0.01
"""A probe is over within 1 ms; a client stays."""
SETTLE: Final[Seconds] = 0.3
"""How long a stop waits for a connection to go that may be another's probe."""


class Observer:
    """Looks at one hub. Needs its settings and nothing else; changes nothing."""

    hears: ClassVar[bool] = False
    """This process takes the callbacks itself, and ends when it cannot any more."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings = settings
        self.environment = environment
        self.unbindable: set[Port] = set()
        self.kept: frozenset[int] = frozenset()
        """Inodes of the listening sockets that this process keeps for its servers."""
        self.answered: dict[Identity, Handshake] = {}
        """What servers answered that were started since the last look: not asked again at once."""
        self.reached: dict[str, Health] = {}
        """SNA → what it answered to a health check."""

    @property
    def probe_host(self) -> str:
        return "127.0.0.1" if self.settings.bind == "0.0.0.0" else self.settings.bind  # noqa: S104

    def now(self) -> Seconds:
        return time.time()

    # -- looking

    def look(
        self, desired: Desired, ledger: Ledger, *, ask: bool = True, secrets: bool = True
    ) -> Actual:
        """One look at everything that the VMs in scope depend on. Changes nothing.

        Without `ask` no SNA is asked about its jobs, without `secrets` no secret is read, and no
        SNA asked whether it is well: `status` does neither.
        """
        sockets_seen = self._settled()
        listening: dict[Port, set[int]] = defaultdict(set)
        clients: Counter[Port] = Counter()
        for one in sockets_seen:
            if one.listening:
                listening[one.port].add(one.inode)
            else:
                clients[one.port] += 1
        ours, foreign_processes = self._sorted()
        servers = [self._server(process, served, listening, clients) for process, served in ours]
        names = self._names(desired, ledger)
        servers = self._shaken(servers, names, desired.vms)
        lines, tunnels = self._tunnels(desired, ledger)
        served_ports = {server.mark.port for server in servers if server.listening}
        strangers = [
            one
            for one in sockets_seen
            if one.listening
            and one.port in self.settings.ports
            and one.port not in served_ports
            and self._conflicts(one.address)
        ]
        if strangers:
            own_inodes = {proc.listener_inode(server.pid) for server in servers} | self.kept
            own_inodes |= {inode for line in lines for inode in proc.socket_inodes(line.pid)}
            strangers = [one for one in strangers if one.inode not in own_inodes]
        found = repositories.look(self.settings, desired, ledger, servers)
        reports = self._reports(desired, ledger, servers) if ask else {}
        claimed, served = found.owners.keys(), {(one.mark.vm, one.mark.run) for one in servers}
        wanted = needed(desired.vms.values(), ledger, claimed, served, self.now())
        return Actual(
            servers=tuple(
                replace(one, holds_image=False) if one.identity in found.detached else one
                for one in servers
            ),
            foreign=tuple(self._foreign(foreign_processes, sockets_seen)),
            listeners=self._listeners(strangers),
            images=found.images,
            claims={run: owner.state_id for run, owner in found.owners.items()},
            rivals=rivals(found.owners, ledger.state_id),
            intents=frozenset(found.intents),
            tainted=frozenset(found.tainted),
            troubles=found.troubles,
            hangs=found.hangs,
            file_systems=found.file_systems,
            others=found.others,
            reports=reports,
            appliances=self._reached(wanted) if secrets else None,
            secrets=self._secrets(desired, ledger) if secrets else {},
            tunnels=tunnels,
            lines=tuple(lines),
            unheard=self._unheard(desired, ledger, sockets_seen),
            unbindable=frozenset(self.unbindable),
        )

    def _tunnels(
        self, desired: Desired, ledger: Ledger
    ) -> tuple[Sequence[Ssh], Mapping[str, TunnelSeen]]:
        """Every ssh of ours, and what is seen of the tunnels in scope."""
        if not (desired.tunnels or ledger.tunnels):
            return (), {}  # a hub without tunnels pays nothing for them
        from reconciler import dialling

        lines = dialling.lines_of(self.settings.hub)
        if not desired.tunnels:
            return lines, {}
        return lines, dialling.Dialler(self.settings, self.environment).look(desired.tunnels, lines)

    def _settled(self) -> list[proc.Socket]:
        """The sockets, without connections that come and go: another command's probes."""
        seen = proc.tcp_sockets()
        if not any(one.port in self.settings.ports and not one.listening for one in seen):
            return seen
        time.sleep(PROBE)
        again = {one.peer for one in proc.tcp_sockets() if not one.listening}
        return [one for one in seen if one.listening or one.peer in again]

    def _sorted(
        self,
    ) -> tuple[list[tuple[proc.Process, Served]], list[tuple[proc.Process, Served]]]:
        ours: list[tuple[proc.Process, Served]] = []
        foreign: list[tuple[proc.Process, Served]] = []
        for process in proc.processes():
            served = parse(process.argv)
            if served is None:
                continue
            mine = served.mark is not None and served.mark.hub == self.settings.hub
            (ours if mine else foreign).append((process, served))
        return ours, foreign

    def _server(
        self,
        process: proc.Process,
        served: Served,
        listening: Mapping[Port, set[int]],
        clients: Mapping[Port, int],
    ) -> Server:
        assert served.mark is not None
        port = served.mark.port
        inode = proc.listener_inode(process.identity.pid)
        there = listening.get(port, set())
        return Server(
            identity=process.identity,
            argv=served.argv,
            mark=served.mark,
            starting=served.starting,
            age=proc.age(process.identity) if served.starting else 0.0,
            # Another user's descriptors are not ours to see: then somebody listening must do.
            listening=inode in there if inode else bool(there),
            clients=clients.get(port, 0),
        )

    def _names(self, desired: Desired, ledger: Ledger) -> Mapping[tuple[str, int, str, int], str]:
        """The export name that each server should answer to."""
        exports: list[Export] = [e for vm in desired.vms.values() for e in vm.exports]
        for call in ledger.open:
            if call.state.active:
                exports.extend(call.exports)
        return {(e.vm, e.key, e.run, e.attempt): e.name for e in exports}

    def _shaken(
        self,
        servers: Sequence[Server],
        names: Mapping[tuple[str, int, str, int], str],
        scope: Collection[str],
    ) -> list[Server]:
        """The servers with what they answered, those in scope only."""
        asked = [
            server
            for server in servers
            if server.mark.vm in scope
            and not server.starting
            and server.listening
            and server.identity not in self.answered
        ]
        full = [s for s in asked if s.clients >= self.settings.qemu_nbd.shared]
        asked = [server for server in asked if server not in full]
        targets = [
            nbd.Target(
                self.probe_host,
                server.mark.port,
                names.get(server.mark.key) or _option(server.argv, "--export-name"),
            )
            for server in asked
        ]
        fresh = nbd.handshake(targets, HANDSHAKE)
        answers = {**self.answered, **dict(zip([s.identity for s in asked], fresh, strict=True))}
        self.answered.clear()
        for server in full:
            slots = self.settings.qemu_nbd.shared
            answers[server.identity] = Handshake(error=f"all {slots} slots are in use")
        return [replace(server, handshake=answers.get(server.identity)) for server in servers]

    def _conflicts(self, address: str) -> bool:
        """Whether a listener at `address` keeps us from binding."""
        bind = self.settings.bind
        everywhere = ("0.0.0.0", "::")  # noqa: S104
        return bind in everywhere or address in (*everywhere, bind, f"::ffff:{bind}")

    def _listeners(self, strangers: Sequence[proc.Socket]) -> dict[Port, Listener]:
        holders = proc.holders(one.inode for one in strangers)
        keeper = lock.holder(Path(self.settings.state) / "lock") if strangers else None
        found = {}
        for one in strangers:
            pid = holders.get(one.inode)
            if keeper and pid == keeper.pid:
                continue  # a daemon keeps the sockets of servers that it is about to start again
            found[one.port] = Listener(one.port, one.address, pid, proc.name_of(pid) if pid else "")
        return found

    def _foreign(
        self, found: Iterable[tuple[proc.Process, Served]], seen: Sequence[proc.Socket]
    ) -> Iterable[Foreign]:
        for process, served in found:
            pid = process.identity.pid
            held = self._sockets_of(process)
            ports = {one.port for one in seen if one.listening and one.inode in held}
            if served.port:
                ports.add(served.port)
            what = "a qemu-nbd without our mark"
            if served.mark:
                what = f"a qemu-nbd of hub {served.mark.hub}"
            elif _option(served.argv, "--description").startswith(READER):
                what = "a restore test"
            yield Foreign(pid=pid, what=what, image=served.image, ports=tuple(sorted(ports)))

    def _sockets_of(self, process: proc.Process) -> Collection[int]:
        """The sockets of a server that is not ours."""
        return proc.socket_inodes(process.identity.pid)

    def _unheard(self, desired: Desired, ledger: Ledger, seen: Sequence[proc.Socket]) -> str:
        """Why nobody of this hub takes callbacks that are to come; empty: somebody does, or none is
        to come, or whose the listener is is not ours to see."""
        to_come = (CallState.ACCEPTED, CallState.UNKNOWN)
        to_hear = any(call.state in to_come and call.vm in desired.vms for call in ledger.open)
        # A store of before the address was written down does not say where to look.
        if self.hears or not to_hear or "listen" not in ledger.settings:
            return ""
        listen = self.settings.listen
        there = [one for one in seen if one.listening and one.port == listen.port]
        there = [one for one in there if proc.meets(one.address, listen.host)]
        if not there:
            return f"nothing listens on {listen}"
        inodes, state = {one.inode for one in there}, Path(self.settings.state)
        ours = [one.pid for name in ("lock", "serve.lock") if (one := lock.holder(state / name))]
        if any(proc.socket_inodes(pid) & inodes for pid in ours):
            return ""
        # A command that stays for its runs takes callbacks too, and holds neither lock.
        held = proc.holders(inodes)
        pids = set(held.values())
        if held.keys() < inodes or 1 in pids or any(_has_store(pid, state) for pid in pids):
            return ""
        who = " and ".join(f"{proc.name_of(pid)} (pid {pid})" for pid in sorted(pids))
        return f"{who} listens on {listen}, which is not of this hub"

    def _reports(
        self, desired: Desired, ledger: Ledger, servers: Sequence[Server]
    ) -> dict[str, Report]:
        """What the SNAs say of calls whose outcome or end they may know, or that nobody seems to
        work on any more."""
        found: dict[str, Report] = {}
        busy = {server.mark.key[:1] + server.mark.key[2:] for server in servers if server.clients}
        now = self.now()
        also = {
            call.job_id
            for call in ledger.open
            if call.key not in busy or silent(call, ledger, self.settings, now)
        }
        for name, calls in questions(self.settings, ledger, desired.vms, also).items():
            found |= self.asked(name, calls)
        return found

    def asked(self, sna: str, calls: Sequence[Call]) -> dict[str, Report]:
        """What one SNA says of its jobs. One that does not answer is not asked for the others."""
        found: dict[str, Report] = {}
        try:
            with self.line(sna) as line:
                for call in calls:
                    found[call.job_id] = report = line.ask(call.job_id)
                    if report.known is None:
                        break
        except HostError as error:
            report = Report(None, message=str(error))
        for call in calls:
            found.setdefault(call.job_id, report)
        return found

    def _reached(self, names: Collection[str]) -> dict[str, Health]:
        """Whether the SNAs are well for which runs are to begin; each is asked once by this hub's
        eyes, so that what did not begin in one pass does not begin in the next."""
        missing = {name for name in names if name in self.settings.snas} - self.reached.keys()
        if missing:
            self.reached |= self._health_of(missing)
        return {name: self.reached[name] for name in names if name in self.reached}

    def _health_of(self, names: Collection[str]) -> Mapping[str, Health]:
        return self.healths(names)

    def healths(self, names: Collection[str]) -> dict[str, Health]:
        """What some SNAs answer to one health check each, all at once; without those that the
        config does not have."""
        names = [name for name in names if name in self.settings.snas]
        deadline = max((self.settings.snas[name].connect_timeout for name in names), default=0.0)
        found = reaching.side_by_side(names, self._health, deadline + reaching.SLACK)
        return {
            name: reaching.with_holder(self.settings.snas[name].url, health)
            for name, health in found.items()
        }

    def _health(self, sna: str) -> Health | None:
        try:
            line = self.line(sna)
        except HostError:
            return None  # its token cannot be read: SecretUnreadable tells
        with line:
            return line.health(self.settings.snas[sna].connect_timeout)

    def _secrets(self, desired: Desired, ledger: Ledger) -> dict[str, str]:
        """Which of the secrets that a due call needs cannot be read, and why."""
        wrong: dict[str, str] = {}
        needed: set[tuple[str, str]] = set()
        for vm in desired.vms.values():
            if not vm.exported or vm.purpose != "backup":
                continue
            call = ledger.latest(vm.name, vm.run)
            if call is None or call.state in (CallState.DUE, CallState.REJECTED):
                needed |= {("vcenter", vm.vcenter), ("sna", vm.sna)}
        for kind, name in sorted(needed):
            try:
                if kind == "vcenter":
                    self.password(name)
                else:
                    self._token(name)
            except HostError as error:
                wrong[f"{kind} {name}"] = str(error)
        return wrong

    def line(self, sna: str) -> Line:
        from reconciler.host.sna import Line

        return Line(self.settings.snas[sna], self._token(sna))

    def _token(self, sna: str) -> Secret | None:
        from reconciler.host.files import secret

        ref = self.settings.snas[sna].token
        return secret(ref, self.environment) if ref else None

    def password(self, vcenter: str) -> Secret:
        from reconciler.host.files import secret

        return secret(self.settings.vcenters[vcenter].password, self.environment)


def questions(
    settings: Settings,
    ledger: Ledger,
    vms: Collection[str] | None = None,
    also: Collection[str] = (),
) -> dict[str, list[Call]]:
    """SNA → the calls, of some VMs or of all, whose outcome or end it may know.

    `also`: jobs that are asked about although they are accepted, and their client is to speak.
    """
    asked: dict[str, list[Call]] = defaultdict(list)
    for call in ledger.open:
        sna = settings.snas.get(call.sna)
        if not call.state.active or sna is None or (vms is not None and call.vm not in vms):
            continue
        if call.state is not CallState.ACCEPTED or sna.reports_end or call.job_id in also:
            asked[call.sna].append(call)
    return asked


def rivals(owners: Mapping[tuple[str, str], Owner], state_id: str) -> dict[tuple[str, str], str]:
    """(VM, run) → the other state directory that claimed it, where that is still in its place."""
    others = {key: one for key, one in owners.items() if one.state_id != state_id and one.directory}
    there = {one: _is_there(one) for one in set(others.values())}
    return {key: one.directory for key, one in others.items() if there[one]}


def _has_store(pid: int, state: Path) -> bool:
    """Whether a process has this hub's store or its directory open; so has who takes callbacks."""
    return any(proc.has_open(pid, str(path)) for path in (state / STORE, state))


def _is_there(owner: Owner) -> bool:
    try:
        return state_id_of(Path(owner.directory)) == owner.state_id
    except StoreError:
        return True  # what cannot be read may well be in use


def _option(line: Sequence[str], name: str) -> str:
    return line[line.index(name) + 1] if name in line[:-1] else ""
