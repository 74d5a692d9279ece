"""A hub in memory: it refuses what the real one refuses, and can be crashed at every step.

`FakeHost` is the machine and what acts on it, `FakeRecords` the store, `FakeSna` an appliance.
What dies and what stays is as in the real world: a crash takes the process that plans, its bound
sockets and nothing else.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import TracebackType
from typing import Any, Final

from msgspec.structs import replace

from reconciler.core.actions import CHANGES, Hold
from reconciler.core.actual import Actual, Foreign, Handshake, Identity, Image, Listener, Server
from reconciler.core.appliances import Health, needed
from reconciler.core.call import (
    Answer,
    Call,
    CallEvent,
    CallState,
    Report,
    Seal,
    job_id,
    step,
)
from reconciler.core.call_plan import sighted
from reconciler.core.desired import Desired, Export, Vm
from reconciler.core.errors import HostError
from reconciler.core.ledger import (
    Applied,
    Archived,
    DiskReport,
    Kept,
    Lease,
    Ledger,
    Pause,
    Proof,
    Shelf,
    Sighting,
    Telemetry,
)
from reconciler.core.mark import ENTER, Mark, Served, argv, parse
from reconciler.core.parents import layers
from reconciler.core.plan import Plan, plan
from reconciler.core.settings import Secret, Settings
from reconciler.core.tunnel import Tunnel, mark_of
from reconciler.core.tunnel_seen import Dialled, Ssh
from reconciler.core.units import Bytes, Port, Seconds
from reconciler.execute import Step, execute

START: Final[Seconds] = 1_800_000_000.0
"""When the fake clock begins. Seconds since the epoch."""
PASSWORD: Final = "of the vCenter"


class Crash(BaseException):
    """The process that plans and executes ended in this moment."""


class Fuse:
    """Burns at every step; where it ends, the process crashes, and nothing more comes of it."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.blown = False
        self._lock = threading.Lock()

    def burn(self) -> None:
        with self._lock:
            if self.left is not None and not self.blown:
                self.blown = self.left <= 0
                self.left -= 1
            if self.blown:
                raise Crash


class FakeRecords:
    """What host/store remembers, with its refusals: one step at a time, a port once."""

    def __init__(self, hub: str, state_id: str, fuse: Fuse | None = None) -> None:
        self.hub, self.state_id = hub, state_id
        self.fuse = fuse or Fuse()
        self.leases: dict[tuple[str, int, str, int], Lease] = {}
        self.calls: dict[tuple[str, str, int], Call] = {}
        self.targets: dict[tuple[str, str, int], str] = {}
        self.archived: dict[tuple[str, int], Archived] = {}
        self.proofs: dict[tuple[str, str], Proof] = {}
        self.applied: dict[str, Applied] = {}
        self.reports: dict[str, dict[int, DiskReport]] = {}
        self.telemetry: dict[str, Telemetry] = {}
        self.sightings: dict[str, Sighting] = {}
        self.pauses: dict[str, Pause] = {}
        self.dials: dict[tuple[str, str], Dialled] = {}
        self._lock = threading.RLock()

    def ledger(self) -> Ledger:
        return Ledger(
            hub=self.hub,
            state_id=self.state_id,
            leases=tuple(self.leases.values()),
            calls=tuple(self.calls.values()),
            applied=dict(self.applied),
            reports={job: dict(found) for job, found in self.reports.items()},
            telemetry=dict(self.telemetry),
            sightings=dict(self.sightings),
            pauses=dict(self.pauses),
            shelf=Shelf(self.kept),
            dialled=dict(self.dials),
        )

    def dialled(self, found: Dialled) -> None:
        self.dials[found.tunnel, found.part] = found

    def hung_up(self, tunnel: str, part: str) -> None:
        self.dials.pop((tunnel, part), None)

    def kept(self, jobs: Sequence[str]) -> Mapping[str, Kept]:
        return {
            job: Kept(
                archived={p: one for (its, p), one in self.archived.items() if its == job},
                reports=dict(self.reports.get(job, {})),
                heard=self.telemetry.get(job),
                proofs={kind: one for (its, kind), one in self.proofs.items() if its == job},
            )
            for job in jobs
        }

    # -- what an appliance's client says

    def report(self, job: str, position: int, now: Seconds = START) -> None:
        """One disk has arrived, by its word."""
        found = self.reports.setdefault(job, {})
        report = DiskReport(
            job_id=job, position=position, change_id=f"{job}/{position}", bytes=1 << 20, at=now
        )
        found.setdefault(position, report)

    def word(self, job: str, now: Seconds = START, **changes: Any) -> None:
        """A word about how far it is."""
        values: dict[str, Any] = {
            "job_id": job,
            "first": now,
            "at": now,
            "status": "running",
            "phase": "copying",
            "bytes": 1,
            "total": 2,
            "speed": 1,
            "percent": 50.0,
            "error": "",
            **changes,
        }
        self.telemetry[job] = Telemetry(**values)

    # -- the `Records` protocol of reconciler/execute.py

    def hold(self, leases: Sequence[Lease], call: Call | None) -> None:
        self.fuse.burn()
        with self._lock:
            after = dict(self.leases)
            for lease in leases:
                before = after.get(lease.key)
                after[lease.key] = (
                    replace(
                        before,
                        port=lease.port,
                        since=lease.since,
                        started=before.started and before.port == lease.port,
                        safe=lease.safe,
                    )
                    if before
                    else lease
                )
                if Counter(one.port for one in after.values())[lease.port] > 1:
                    raise HostError(f"cannot write: port {lease.port} is leased", "Store")
            self.leases = after
            if call:
                self._insert(call, replace_due=True)
        self.fuse.burn()

    def started(self, leases: Sequence[Lease], now: Seconds, *, again: bool = False) -> None:
        self.fuse.burn()
        with self._lock:
            for lease in leases:
                known = self.leases.get(lease.key)
                if known:
                    self.leases[lease.key] = replace(
                        known,
                        started=True,
                        restarts=known.restarts + int(again),
                        up=now,
                        deaths=lease.deaths,
                        rest=lease.rest,
                    )
        self.fuse.burn()

    def release(self, leases: Sequence[Lease]) -> None:
        self.fuse.burn()
        with self._lock:
            for lease in leases:
                known = self.leases.get(lease.key)
                if known and known.port == lease.port:
                    del self.leases[lease.key]
        self.fuse.burn()

    def remember(self, call: Call) -> None:
        self.fuse.burn()
        with self._lock:
            self._insert(call, replace_due=False)
        self.fuse.burn()

    def advance(
        self,
        call: Call,
        event: CallEvent,
        now: Seconds,
        *,
        archived: Iterable[Archived] = (),
        **changes: object,
    ) -> Call:
        state = step(call.state, event)
        self.fuse.burn()
        with self._lock:
            known = self.calls.get(call.key)
            if known is None or known.state is not call.state:
                raise HostError(f"cannot take {event}: it is not {call.state} any more", "Store")
            told: dict[str, Any] = dict(changes)
            if "targets" in told:
                self.targets[call.key] = told["targets"]
            if event is CallEvent.INTEND:
                told["called"] = now
            if state.terminal:
                told["ended"] = now
            done = replace(known, state=state, changed=now, **{"reason": str(event), **told})
            self.calls[call.key] = done
            self.archived |= {(one.job_id, one.position): one for one in archived}
        self.fuse.burn()
        return done

    def taint(self, call: Call) -> None:
        self.fuse.burn()
        with self._lock:
            if call.key in self.calls:
                self.calls[call.key] = replace(self.calls[call.key], tainted=True)
        self.fuse.burn()

    # -- what the loop and the operator's orders write

    def clients_seen(self, leases: Iterable[Lease]) -> None:
        with self._lock:
            for lease in leases:
                if lease.key in self.leases:
                    self.leases[lease.key] = replace(self.leases[lease.key], clients_seen=True)

    def another_attempt(self, call: Call, now: Seconds, reason: str) -> None:
        with self._lock:
            self.calls[call.key] = replace(
                call, state=step(call.state, CallEvent.RESEND), changed=now, message=reason
            )
            again = replace(
                call,
                attempt=call.attempt + 1,
                job_id=job_id(self.hub, call.vm, call.run, call.attempt + 1),
                state=CallState.DUE,
                request="",
                exports=(),
                created=now,
                changed=now,
                reason=str(CallEvent.RESEND),
                message=reason,
                failures=0,
                retry_at=0.0,
                tainted=False,
            )
            self.calls[again.key] = again

    def _insert(self, call: Call, *, replace_due: bool) -> None:
        known = self.calls.get(call.key)
        if known is None:
            self.calls[call.key] = call
        elif replace_due and known.state in (CallState.DUE, CallState.REJECTED):
            self.calls[call.key] = replace(
                known,
                sna=call.sna,
                type=call.type,
                request=call.request,
                exports=call.exports,
                display_name=call.display_name,
                path=call.path,
                vcenter=call.vcenter,
                fallback=call.fallback,
            )


class Reply(StrEnum):
    """What an appliance does with the next POST."""

    START = "starts the job"
    DOWN = "does not answer the health check before the POST"
    UNSENT = "goes away between the health check and the POST"
    REJECT = "400"
    CONFLICT = "409, and does nothing"
    BROKEN = "500, and does nothing"
    BROKEN_ACTED = "500, but has started the job"
    DROP_BEFORE = "drops the connection, and does nothing"
    DROP_AFTER = "starts the job and drops the connection"
    HANG = "starts the job long after we gave up"
    STRANGER = "200, but about something else"


@dataclass(frozen=True, slots=True)
class Post:
    """One POST that reached an appliance, and the servers as they were then."""

    request: Mapping[str, str]
    disks: tuple[int, ...]
    silent: tuple[str, ...]
    """Targets where nothing answered under that name."""


class FakeSna:
    """A node appliance as they are in the field: no de-duplication, jobs in memory only.

    One that `remembers` keeps its jobs over a restart: a job that it has is not begun again, and
    one that it has denied is not begun later.
    """

    def __init__(self, *, remembers: bool = False) -> None:
        self.remembers = remembers
        self.script: deque[Reply] = deque()
        """One per POST; when it is used up, every POST starts its job."""
        self.started: list[str] = []
        """Job ids, one per snapshot and writer that was started. This outlives a restart."""
        self.jobs: dict[str, str] = {}
        """Job id → status, as far as it is remembered."""
        self.late: list[str] = []
        self.posts: list[Post] = []
        self.deaf = False
        """It can be asked nothing."""
        self.down = False
        """Its tunnel is down: it answers no health check."""

    def act(self, job: str) -> None:
        if self.remembers and job in self.jobs:
            return
        self.started.append(job)
        self.jobs[job] = "running"

    def wake(self) -> None:
        """What was delivered late is done now."""
        for job in self.late:
            self.act(job)
        self.late.clear()

    def forget(self) -> None:
        """It restarts."""
        if not self.remembers:
            self.jobs.clear()

    def ask(self, job: str) -> Report:
        if self.deaf:
            return Report(None, message="no answer in time")
        if job not in self.jobs:
            if self.remembers and job in self.late:
                self.late.remove(job)
            return Report(False, message="it does not know the job")
        return Report(True, self.jobs[job])

    def answer(self, post: Post) -> Answer:
        job = post.request["job_id"]
        reply = self.script.popleft() if self.script else Reply.START
        if reply is Reply.UNSENT:
            return Answer(False, error="connection refused")
        self.posts.append(post)
        if reply in (Reply.START, Reply.BROKEN_ACTED, Reply.DROP_AFTER):
            self.act(job)
        match reply:
            case Reply.START:
                return Answer(True, 200, f'{{"job_id": "{job}", "status": "started"}}')
            case Reply.REJECT:
                return Answer(True, 400, "vm_path is required")
            case Reply.CONFLICT:
                return Answer(True, 409, "busy")
            case Reply.BROKEN | Reply.BROKEN_ACTED:
                return Answer(True, 500, "failed to start backup")
            case Reply.STRANGER:
                return Answer(True, 200, '{"job_id": "another", "status": "started"}')
            case Reply.HANG:
                self.late.append(job)
            case _:
                pass
        return Answer(True, None, error="no answer in time")


_parsed = lru_cache(maxsize=4096)(parse)


@dataclass(slots=True)
class Process:
    """A qemu-nbd of anybody's; its argv says whose."""

    identity: Identity
    argv: tuple[str, ...]
    port: Port | None
    """Where it listens; None: nowhere."""
    starting: bool = False
    silent: bool = False
    size: Bytes = 0
    """Of the image that it was started on."""
    detached: bool = False
    """The file that it has open is not the one at its image's path any more."""
    clients: int = 0
    unflushed: bool = False
    """A client was told that something is written which a sudden death would undo."""

    @property
    def served(self) -> Served:
        served = _parsed(self.argv)
        assert served is not None
        return served

    @property
    def name(self) -> str:
        return self.argv[self.argv.index("--export-name") + 1]

    @property
    def writes(self) -> bool:
        return "--read-only" not in self.argv


@dataclass(frozen=True, slots=True)
class Ended:
    """A server that was ended by order, as it was in that moment."""

    mark: Mark | None
    clients: int
    answered: bool
    active: bool
    """Its run was one that an appliance may be writing."""


class Socket:
    """A bound and listening socket of the process that plans."""

    def __init__(self, host: FakeHost, port: Port) -> None:
        self.host, self.port = host, port

    def fileno(self) -> int:
        return self.port

    def close(self) -> None:
        self.host.sockets.discard(self)


class FakeLine:
    """A connection to an appliance."""

    def __init__(self, host: FakeHost, sna: FakeSna) -> None:
        self.host, self.sna = host, sna

    def __enter__(self) -> FakeLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def preflight(self) -> None:
        self.host.fuse.burn()
        if self.sna.down:
            raise HostError("GET /api/v1/health: connection refused", "ApplianceUnreachable")
        if self.sna.script and self.sna.script[0] is Reply.DOWN:
            self.sna.script.popleft()
            raise HostError("GET /api/v1/health: connection refused", "ApplianceUnreachable")

    def start(self, request: Mapping[str, str], password: Secret) -> Answer:
        self.host.fuse.burn()
        assert password.reveal() == PASSWORD
        with self.host.lock:
            answer = self.sna.answer(self.host.seen_by_client(request))
        self.host.fuse.burn()
        return answer


@dataclass
class FakeHost:
    """A machine with its processes, sockets, files and appliances; the `Host` of execute.py."""

    settings: Settings
    clock: Seconds = START
    fuse: Fuse = field(default_factory=Fuse)
    processes: dict[Identity, Process] = field(default_factory=dict)
    listeners: dict[Port, Listener] = field(default_factory=dict)
    """Those of strangers."""
    unseen: set[Port] = field(default_factory=set)
    """Ports that cannot be bound although nobody is seen there."""
    sockets: set[Socket] = field(default_factory=set)
    images: dict[str, Image] = field(default_factory=dict)
    claims: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(root, VM, run) → state id."""
    failing: set[tuple[str, int]] = field(default_factory=set)
    """(VM, disk key) whose server does not come up."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Root, or `vcenter NAME`, → why it cannot be read."""
    ended: list[Ended] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    """Images in which a check finds errors."""
    losses: set[tuple[str, str, int]] = field(default_factory=set)
    """(VM, run, attempt) of which acknowledged writes are gone."""
    lines: list[Ssh] = field(default_factory=list)
    """The ssh of tunnels."""
    undialled: str = ""
    """The layer by which no tunnel can be dialled; empty: they can."""
    not_permitted: set[Port] = field(default_factory=set)
    """What the hub's sshd refuses."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    who: str = "somebody"

    def __post_init__(self) -> None:
        self.records = FakeRecords(self.settings.hub, "state-1", self.fuse)
        self.snas = {
            name: FakeSna(remembers=sna.remembers_jobs) for name, sna in self.settings.snas.items()
        }
        self.unbindable: set[Port] = set()
        self.intents: set[tuple[str, str, int]] = set()
        self.taints: set[tuple[str, str, int]] = set()
        self._pids = 4000
        self._states = 1

    # -- tunnels

    def dial(self, tunnel: Tunnel, part: str, argv: Sequence[str]) -> Ssh:
        if self.undialled:
            raise HostError(f"cannot dial {tunnel.target}: no", self.undialled)
        self._pids += 1
        mark = mark_of(argv)
        assert mark is not None
        ports = frozenset(tunnel.ports(part))
        line = Ssh(pid=self._pids, started=1, argv=tuple(argv), mark=mark, listening=ports)
        self.lines.append(line)
        return line

    def hang_up(self, ssh: Ssh) -> None:
        self.lines = [one for one in self.lines if one.pid != ssh.pid]

    def refused(self, tunnel: Tunnel, part: str) -> list[Port]:
        return sorted(self.not_permitted & set(tunnel.ports(part)))

    # -- looking: as Hub.look does

    def now(self) -> Seconds:
        return self.clock

    def look(self, desired: Desired, ledger: Ledger) -> Actual:
        """One look; what was starting has come up by the next."""
        ours = [p for p in self.processes.values() if self.is_ours(p)]
        names = {
            (e.vm, e.key, e.run, e.attempt): e.name
            for e in (
                *(e for vm in desired.vms.values() for e in vm.exports),
                *(e for call in ledger.calls if call.state.active for e in call.exports),
            )
        }
        servers = tuple(self._server(p, names, desired.vms) for p in ours)
        claims, troubles = self._claims(desired, servers)
        seen = Actual(
            servers=servers,
            foreign=tuple(self._foreign()),
            listeners={p: one for p, one in self.listeners.items() if p in self.settings.ports}
            | {
                p.port: Listener(p.port, "127.0.0.1", p.identity.pid, "qemu-nbd")
                for p in self.processes.values()
                if p not in ours and p.port in self.settings.ports and p.port is not None
            },
            images=self._images(desired, ledger),
            claims=claims,
            tainted=frozenset(self.taints),
            intents=frozenset(
                call.key
                for call in ledger.calls
                if call.state in (CallState.DUE, CallState.REJECTED) and call.key in self.intents
            ),
            troubles=troubles,
            reports=self._reports(desired, ledger),
            secrets={
                name: why for name, why in self.unreadable.items() if name.startswith("vcenter ")
            },
            unbindable=frozenset(self.unbindable),
            appliances={
                name: Health(kind="refused", said="connection refused", here=True)
                if self.snas[name].down
                else Health(status=200)
                for name in needed(
                    desired.vms.values(),
                    ledger,
                    claims.keys(),
                    {(server.mark.vm, server.mark.run) for server in servers},
                    self.now(),
                )
                if name in self.snas
            },
        )
        for process in ours:
            process.starting = False
            process.argv = process.served.argv
        return seen

    def is_ours(self, process: Process) -> bool:
        mark = process.served.mark
        return mark is not None and mark.hub == self.settings.hub

    def _server(
        self,
        process: Process,
        names: Mapping[tuple[str, int, str, int], str],
        scope: Mapping[str, Vm],
    ) -> Server:
        served = process.served
        assert served.mark is not None
        listening = process.port == served.mark.port
        handshake = None
        if served.mark.vm in scope and not served.starting and listening:
            handshake = self._handshake(process, names.get(served.mark.key) or process.name)
        return Server(
            identity=process.identity,
            argv=served.argv,
            mark=served.mark,
            starting=served.starting,
            listening=listening,
            holds_image=not process.detached,
            clients=process.clients,
            handshake=handshake,
        )

    def _handshake(self, process: Process, name: str) -> Handshake:
        if process.clients >= self.settings.qemu_nbd.shared:
            return Handshake(error=f"all {process.clients} slots are in use")
        if process.silent:
            return Handshake(error="no answer in time")
        if process.name != name:
            return Handshake(error=f"it knows no export {name}")
        image = self.images.get(process.argv[-1])
        size = image.size if image else process.size
        return Handshake(size, read_only=not process.writes)

    def _foreign(self) -> Iterable[Foreign]:
        for process in self.processes.values():
            if not self.is_ours(process):
                mark = process.served.mark
                yield Foreign(
                    pid=process.identity.pid,
                    what=f"a qemu-nbd of hub {mark.hub}" if mark else "a qemu-nbd without our mark",
                    image=process.served.image,
                    ports=(process.port,) if process.port else (),
                )

    def _images(self, desired: Desired, ledger: Ledger) -> dict[str, Image]:
        paths: set[str] = set()
        for vm in desired.vms.values():
            call = ledger.active(vm.name) or ledger.latest(vm.name, vm.run)
            for export in (*vm.exports, *(call.exports if call else ())):
                paths |= {export.image} | ({export.backing} if export.backing else set())
                if export.backing:
                    paths |= {one.path for one in layers(ledger, vm.name, export.backing)}
        return {path: self.images.get(path) or Image(path=path, exists=False) for path in paths}

    def _claims(
        self, desired: Desired, servers: Sequence[Server]
    ) -> tuple[dict[tuple[str, str], str], dict[str, str]]:
        wanted: set[tuple[str, str, str]] = {
            (vm.root, vm.name, vm.run)
            for vm in desired.vms.values()
            if vm.exported and vm.purpose == "backup"
        } | {
            (root, server.mark.vm, server.mark.run)
            for server in servers
            if server.mark.vm in desired.vms and "--read-only" not in server.argv
            for root in self.settings.repositories.values()
        }
        troubles = {
            vm: f"cannot read the claim in {root}: {self.unreadable[root]}"
            for root, vm, _ in wanted
            if root in self.unreadable
        }
        found = {key[1:]: owner for key, owner in self.claims.items() if key in wanted}
        return found, troubles

    def _reports(self, desired: Desired, ledger: Ledger) -> dict[str, Report]:
        found = {}
        for call in ledger.calls:
            sna = self.settings.snas.get(call.sna)
            if call.vm not in desired.vms or not call.state.active or sna is None:
                continue
            if call.state is CallState.ACCEPTED and not sna.reports_end:
                continue
            found[call.job_id] = self.snas[call.sna].ask(call.job_id)
        return found

    # -- acting: the `Host` protocol of reconciler/execute.py

    def reserve(self, port: Port) -> Socket:
        self.fuse.burn()
        with self.lock:
            if port in self.busy():
                self.unbindable.add(port)
                raise HostError(f"cannot listen on 127.0.0.1:{port}", "PortTaken")
            socket = Socket(self, port)
            self.sockets.add(socket)
        self.fuse.burn()
        return socket

    def busy(self) -> set[Port]:
        """Where nobody else can listen now."""
        held = {p.port for p in self.processes.values() if p.port is not None}
        return held | set(self.listeners) | self.unseen | {one.port for one in self.sockets}

    def claim(self, vm: Vm) -> None:
        self.fuse.burn()
        owner = self.claims.setdefault((vm.root, vm.name, vm.run), self.records.state_id)
        if owner != self.records.state_id:
            raise HostError(f"cannot claim run {vm.run}: it is {owner}'s", "ClaimedElsewhere")
        self.fuse.burn()

    def intend(self, vm: Vm, call: Call) -> None:
        self.fuse.burn()
        self.intents.add(call.key)
        self.fuse.burn()

    def taint(self, vm: Vm, call: Call) -> None:
        self.fuse.burn()
        self.taints.add(call.key)
        self.fuse.burn()

    def unintend(self, vm: Vm, call: Call) -> None:
        self.fuse.burn()
        self.intents.discard(call.key)
        self.fuse.burn()

    def create(self, export: Export, root: str) -> None:
        self.fuse.burn()
        assert export.size is not None
        assert export.image.startswith(f"{root}/")
        with self.lock:
            if export.image in self.images:
                raise HostError(f"cannot create {export.image}: something is there", "CannotCreate")
            if export.backing and export.backing not in self.images:
                raise HostError(f"cannot create {export.image}: no parent", "CannotCreate")
            self.put(export.image, export.size, backing=export.backing)
        self.fuse.burn()

    def start(self, export: Export, lease: Lease, listener: object) -> None:
        assert isinstance(listener, Socket)
        assert listener in self.sockets, "the socket was closed before it was handed over"
        assert listener.port == lease.port
        self.fuse.burn()
        line = argv(export, lease.port, self.settings.hub, self.settings.qemu_nbd)
        with self.lock:
            image = self.images.get(export.image)
            process = self.spawn(("sh", "-c", ENTER, *line), lease.port)
        self.fuse.burn()  # here the server is left behind in the act of starting
        with self.lock:
            process.argv, process.size = line, image.size if image else 0
            wrong = ""
            if image is None:
                wrong = "no such file or directory"
            elif any(p is not process and self._writes(p, export) for p in self.mine()):
                wrong = 'Failed to get "write" lock'
            elif (export.vm, export.key) in self.failing:
                wrong = "it ended"
            elif export.size is not None and image.size != export.size:
                wrong = f"it exports {image.size} bytes"
            if wrong:
                del self.processes[process.identity]
                raise HostError(f"cannot serve {export.image}: {wrong}", "StartFailed")
        self.fuse.burn()

    def _writes(self, process: Process, export: Export) -> bool:
        return process.argv[-1] == export.image and (process.writes or not export.read_only)

    def look_again(self, server: Server, export: Export) -> Server | None:
        self.fuse.burn()
        process = self.held(server.identity)
        if process is None:
            return None
        return replace(
            server, clients=process.clients, handshake=self._handshake(process, export.name)
        )

    def held(self, identity: Identity) -> Process | None:
        """What host/processes.py gets a hold of; None: it has ended, whosever its pid is now."""
        return self.processes.get(identity)

    def stop(self, server: Server, *, kill_clients: bool) -> None:
        self.fuse.burn()
        with self.lock:
            process = self.held(server.identity)
            if process is None:
                return
            if process.clients and not kill_clients:
                raise HostError(f"not stopped: {process.clients} clients", "InUse")
            mark = process.served.mark
            self.ended.append(
                Ended(
                    mark,
                    process.clients,
                    self._handshake(process, process.name).answered and process.port is not None,
                    mark is not None and self._active(mark),
                )
            )
            del self.processes[process.identity]
        self.fuse.burn()

    def _active(self, mark: Mark) -> bool:
        call = self.records.calls.get((mark.vm, mark.run, mark.attempt))
        return call is not None and call.state.active

    def silent(self, exports: Sequence[Export], ports: Mapping[int, Port]) -> list[str]:
        self.fuse.burn()
        wrong = []
        for export in exports:
            size = self.answers(ports.get(export.key), export.name)
            if size is None or export.size not in (None, size):
                wrong.append(f"disk {export.key}: no answer")
        return wrong

    def sealed(self, exports: Sequence[Export], servers: Sequence[Server]) -> list[Seal]:
        self.fuse.burn()
        found = {server.mark.disk: self.processes.get(server.identity) for server in servers}
        seals = []
        with self.lock:
            for export in exports:
                process, image = found[export.key], self.images.get(export.image)
                if process is None or not self._handshake(process, export.name).answered:
                    raise HostError(f"cannot flush disk {export.key}: no answer", "CannotFlush")
                if process.clients:
                    raise HostError(f"not ended: {process.clients} clients", "InUse")
                process.unflushed = False
                if image is None or process.detached:
                    raise HostError(f"another file is at {export.image}", "ImageReplaced")
                damage = "2 errors were found on the image" if export.image in self.damaged else ""
                seals.append(
                    Seal(
                        export.key,
                        export.image,
                        image.pristine,
                        damage,
                        image.size,
                        image.allocated,
                        "sha256:of-nothing",
                    )
                )
        self.fuse.burn()
        return seals

    def answers(self, port: Port | None, name: str) -> Bytes | None:
        """The size that a client is told on a port under an export name."""
        for process in self.processes.values():
            if port is not None and process.port == port and not process.served.starting:
                return self._handshake(process, name).size
        return None

    def line(self, sna: str) -> FakeLine:
        self.fuse.burn()
        return FakeLine(self, self.snas[sna])

    def password(self, vcenter: str) -> Secret:
        self.fuse.burn()
        if f"vcenter {vcenter}" in self.unreadable:
            raise HostError(self.unreadable[f"vcenter {vcenter}"], "SecretUnreadable")
        return Secret(PASSWORD)

    def seen_by_client(self, request: Mapping[str, str]) -> Post:
        """A request, and which of its targets do not answer."""
        disks, silent = [], []
        for pair in request["nbd_targets"].split(","):
            key, url = pair.split(":", 1)
            address, name = url.removeprefix("nbd://").split("/")
            disks.append(int(key))
            if not self.answers(int(address.rsplit(":", 1)[1]), name):
                silent.append(url)
        return Post(dict(request), tuple(disks), tuple(silent))

    # -- what happens in the world

    def spawn(self, line: Sequence[str], port: Port | None, *, pid: int | None = None) -> Process:
        """A process that begins; its pid was never used, or it is the one of a process that ended.

        The start time is its own in either case.
        """
        self._pids += 1
        identity = Identity(pid or self._pids, self._pids * 10)
        process = Process(identity, tuple(line), port)
        self.processes[identity] = process
        return process

    def mine(self) -> list[Process]:
        """Our servers, by port."""
        found = [process for process in self.processes.values() if self.is_ours(process)]
        return sorted(found, key=lambda process: process.port or 0)

    def server(self, vm: str, key: int) -> Process:
        """The one server of a disk."""
        (found,) = [
            p for p in self.mine() if (mark := p.served.mark) and (mark.vm, mark.disk) == (vm, key)
        ]
        return found

    def put(self, path: str, size: Bytes, *, pristine: bool = True, **more: Any) -> None:
        """An image appears."""
        self.images[path] = Image(
            path=path, exists=True, format="qcow2", size=size, pristine=pristine, **more
        )

    def write(self, process: Process) -> None:
        """A client writes; nothing of it is flushed yet, unless the server does so by itself."""
        image = self.images[process.argv[-1]]
        more = image.allocated + 65536
        self.images[image.path] = replace(image, pristine=False, allocated=more)
        process.unflushed = "writethrough" not in process.argv

    def move_away(self, process: Process) -> None:
        """Somebody moves the image of a running server; it writes on into what it has open."""
        process.detached = True
        del self.images[process.argv[-1]]

    def kill(self, process: Process) -> None:
        """kill -9: what its clients were told is written, and was not flushed, is gone."""
        mark = process.served.mark
        if mark and process.unflushed:
            self.losses.add((mark.vm, mark.run, mark.attempt))
        del self.processes[process.identity]

    def crash(self) -> None:
        """The process that planned is gone, and its sockets with it; another one begins."""
        self.sockets.clear()
        self.unbindable.clear()
        self.fuse.left, self.fuse.blown = None, False

    def take_over(self, call: Call) -> None:
        """By an operator's order, what another state directory claimed of this run is ours."""
        for root, vm, run in self.claims:
            if (vm, run) == (call.vm, call.run):
                self.claims[root, vm, run] = self.records.state_id

    def note_sightings(self, ledger: Ledger, actual: Actual) -> None:
        """As loop.py does: when all disks of an uncertain run were first seen with clients."""
        for call in ledger.calls:
            if call.state not in (CallState.UNKNOWN, CallState.INTENDED):
                continue
            taken = sighted(call, actual)
            if taken is None:
                self.records.sightings.pop(call.job_id, None)
            else:
                self.records.sightings.setdefault(call.job_id, Sighting(self.clock, taken))

    def lose_state(self) -> None:
        """The state directory is lost; a new one is made."""
        self._states += 1
        self.records = FakeRecords(self.settings.hub, f"state-{self._states}", self.fuse)

    def started(self) -> Counter[str]:
        """Job id → how many writers were ever started for it."""
        return Counter(job for sna in self.snas.values() for job in sna.started)


def planned(host: FakeHost, desired: Desired) -> Plan:
    """What would be done now."""
    ledger = host.records.ledger()
    return plan(desired, host.look(desired, ledger), ledger, host.now())


def one_pass(
    host: FakeHost, desired: Desired, *, steps: list[Step] | None = None, parallel: int = 1
) -> Plan:
    """Look, plan, execute. The plan that was executed. Raises Crash if the fuse ends."""
    ledger = host.records.ledger()
    actual = host.look(desired, ledger)
    busy = {server.mark.key for server in actual.servers if server.clients}
    host.records.clients_seen([lease for lease in ledger.leases if lease.key in busy])
    host.note_sightings(ledger, actual)
    found = plan(desired, actual, ledger, host.now())
    told = [] if steps is None else steps
    execute(found, host, told.append, parallel=parallel, kill_clients=desired.kill_clients)
    return found


def moves(found: Plan) -> bool:
    """Whether another pass can do something about it."""
    return any(
        action.kind in CHANGES
        or action.cause == "Starting"
        or (isinstance(action, Hold) and (action.event is not None or action.remember))
        for action in found.actions
    )


def settle(host: FakeHost, desired: Desired, most: int = 4) -> list[Step]:
    """Passes until nothing more can be done, as `apply` does. Every step that was taken."""
    steps: list[Step] = []
    for _ in range(most):
        if not moves(one_pass(host, desired, steps=steps)):
            break
    return steps
