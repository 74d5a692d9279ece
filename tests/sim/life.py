"""A hub, those who operate it and the world around it: what a simulated life is lived in.

What can happen in it is in events.py, what must be so at any time in invariants.py. The planner
and the executor are the real ones, and an apply makes its passes as loop.py does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from reconciler.core.actions import Conclude, Witness
from reconciler.core.actual import Image, Listener
from reconciler.core.appliances import Health
from reconciler.core.call import CallState, Report
from reconciler.core.desired import Desired, Export, Vm, attempted, attempted_image
from reconciler.core.disk_plan import export_key
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import Mark
from reconciler.core.plan import Plan, plan
from reconciler.core.settings import Appliance, QemuNbd, Settings
from reconciler.core.units import PortRange, Seconds
from reconciler.execute import Step, execute, resting
from reconciler.loop import PASSES, ended_by_word, without_backoff, worth
from tests.core.builders import a_settings, a_vm
from tests.fakes import Crash, FakeHost, FakeRecords, FakeSna, Process

NAMES: Final = ("ctx-1", "ctx-2", "ctx-10")
RUNS: Final = ("r1", "r2", "r3", "r4")
SITES: Final = {"ctx-1": "site-a", "ctx-2": "site-a", "ctx-10": "site-b"}
"""VM → its appliance: two share one."""
DISKS: Final = {("ctx-1", "r1"): 1, ("ctx-1", "r2"): 2, ("ctx-2", "r1"): 2, ("ctx-2", "r2"): 3}
"""(VM, run) → how many disks it has; 2 if it is not here."""
ENOUGH: Final = "10100-10149"
"""Ports for everything at once."""
RESYNC: Final[Seconds] = 1000.0
"""What one passing of time is: longer than any back-off."""
STRANGERS: Final = ("sshd", "another hub's", "a qemu-nbd")


class World(Struct, frozen=True, kw_only=True):
    """What holds for a whole life."""

    ports: int = 12
    """Size of the port range."""
    max_running: int = 2
    reports_end: bool = False
    remembers_jobs: bool = False
    cache: str = ""
    lock: bool = True
    """One writer at a time. False: the lock is broken, and only the ledger's compare-and-swap
    stands between two operators."""
    declared: tuple[str, ...] = ("r1", "r1", "r1")
    """The runs that the VMs begin with; empty: not declared."""

    def settings(self) -> Settings:
        sna = Appliance(
            url="http://127.0.0.1:9081",
            max_running=self.max_running,
            reports_end=self.reports_end,
            remembers_jobs=self.remembers_jobs,
        )
        return a_settings(
            f"10100-{10099 + self.ports}",
            snas=dict.fromkeys(sorted(set(SITES.values())), sna),
            qemu_nbd=QemuNbd(cache=self.cache or None),
        )


def vm_of(name: str, run: str, **changes: Any) -> Vm:
    return a_vm(name, run, DISKS.get((name, run), 2), **changes)


def strangers(host: FakeHost) -> dict[str, Any]:
    """All that is not ours, to be compared later."""
    return {
        "processes": {
            p.identity: (p.argv, p.port) for p in host.processes.values() if not host.is_ours(p)
        },
        "listeners": dict(host.listeners),
    }


def move_in(host: FakeHost, kind: str, port: int, *, pid: int | None = None) -> None:
    """A stranger takes a port, if it is free."""
    if port in host.busy():
        return
    if kind == "sshd":
        host.listeners[port] = Listener(port, "127.0.0.1", 77, "sshd")
        return
    mark = Mark("hub-b", "ctx-1", 2000, "r1", 1, port)
    description = str(mark) if kind == "another hub's" else "somebody's"
    line = ("qemu-nbd", "--export-name", "x", "--description", description, f"/other/{port}")
    host.spawn(line, port, pid=pid)


def rank(host: FakeHost, desired: Desired) -> dict[str, set[int]]:
    """VM → the disks that have a lease, of the run that is wanted."""
    return {
        vm.name: {export.key for export in vm.exports if export_key(export) in host.records.leases}
        for vm in desired.vms.values()
    }


class Saved(Struct, frozen=True):
    """A backup of a state directory."""

    records: FakeRecords
    calls: Mapping[Any, Any]
    leases: Mapping[tuple[str, int, str, int], Lease]
    targets: Mapping[tuple[str, str, int], str]


class Life:
    """One life: the world as it is now, what people want of it, and what they remember."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.settings = world.settings()
        self.host = FakeHost(self.settings)
        self.vms: dict[str, Vm] = {
            name: vm_of(name, run, sna=SITES[name])
            for name, run in zip(NAMES, world.declared, strict=True)
            if run
        }
        """What the files say."""
        self.before: Mapping[str, Vm] = dict(self.vms)
        """What they said before the last edit."""
        self.asked: Mapping[str, Vm] = {}
        """What the plan that is being executed was made for."""
        self.pending: Iterator[None] | None = None
        """An apply that has looked and has not acted yet."""
        self.planned: Plan | None = None
        """What it is going to do."""
        self.stale = False
        """Another operator has acted since it looked: only where there is no lock."""
        self.raced = False
        """A plan that was older than the ledger has been executed."""
        self.resent: Counter[tuple[str, str]] = Counter()
        """(VM, run) → how often a person ordered another attempt."""
        self.order = False
        """A person has ordered that clients be cut off."""
        self.over: set[str] = set()
        """Job ids whose writers have ended."""
        self.posts: Counter[str] = Counter()
        """SNA → how many of the POSTs that it got were looked at."""
        self.ended: dict[tuple[str, str, int], CallState] = {}
        """The runs that were seen to have ended."""
        self.backups: dict[str, Image] = {}
        """The images of completed runs, as they were when those ended."""
        self.amnesia = False
        """The ledger is not what it was."""
        self.mixed = False
        """The ledger is older than what runs: two VMs may own one port."""
        self.saved: Saved | None = None
        self.files: dict[str, Image] = {}
        """Files of somebody else in our repository."""
        self.moved: dict[str, Image] = {}
        """Images of ours that somebody has moved away."""
        self.counts: Counter[str] = Counter()
        """What was done: `applies`, `passes`, `steps`, `crashes`."""
        self.reached: Mapping[str, Health] = {}
        """What the appliances answered that the apply has asked which is at work."""
        self.begun: set[tuple[str, str]] = set()
        """(VM, run) of which anything was ever seen to be there."""
        self.after_step: Callable[[], None] = lambda: None
        """Called when a step of an apply is done, in the middle of its pass."""
        move_in(self.host, "another hub's", 10101)
        self.foreign = strangers(self.host)

    # -- who is there

    @property
    def snas(self) -> Sequence[FakeSna]:
        return list(self.host.snas.values())

    def sna(self, i: int) -> FakeSna:
        return self.snas[i % len(self.snas)]

    def name(self, i: int) -> str:
        return NAMES[i % len(NAMES)]

    def one(self, i: int) -> Process | None:
        """One of our servers."""
        ours = self.host.mine()
        return ours[i % len(ours)] if ours else None

    def of(self, vm: str) -> list[Process]:
        """The servers of a VM."""
        return [p for p in self.host.mine() if (mark := p.served.mark) and mark.vm == vm]

    def at_work(self) -> set[str]:
        """Job ids that have a writer, whether their appliance remembers it or not."""
        return {job for sna in self.snas for job in sna.started} - self.over

    # -- what is wanted

    def edit(self, vms: Mapping[str, Vm]) -> None:
        """The files say something else from now on."""
        self.before, self.vms = self.vms, dict(vms)

    def desired(self, vms: Mapping[str, Vm] | None = None, **changes: Any) -> Desired:
        """What is declared, with the attempt that the ledger knows of."""
        ledger = self.host.records.ledger()
        wanted = self.vms if vms is None else vms
        found = {name: _at(vm, ledger) for name, vm in wanted.items()}
        return Desired(settings=self.settings, vms=found, **changes)

    # -- applying

    def apply(self, vms: Mapping[str, Vm] | None = None, **changes: Any) -> None:
        """One apply from its first look to its end. Raises Crash if the fuse ends."""
        for _ in self.applying(dict(self.vms if vms is None else vms), **changes):
            pass

    def applying(self, vms: Mapping[str, Vm], **changes: Any) -> Iterator[None]:
        """The passes of one apply; it pauses once, when it has looked and not acted yet."""
        self.counts["applies"] += 1
        failed: set[str] = set()
        heard: dict[str, Report] | None = None
        reached: dict[str, Health] = {}
        for number in range(PASSES):
            ledger = self.host.records.ledger()
            if not number:
                ledger = without_backoff(ledger)
            desired = self.desired(vms, **changes)
            found, heard = self.look(desired, ledger, heard, reached)
            todo = worth(found, failed)
            if not todo.vms or number == PASSES - 1:
                return
            if not number:
                self.planned = todo
                yield
            self.counts["passes"] += 1
            self.asked, self.reached = desired.vms, reached
            done = execute(
                todo, self.host, self.done, parallel=1, kill_clients=desired.kill_clients
            )
            failed |= resting(done)

    def plan(self, desired: Desired, ledger: Ledger) -> Plan:
        """What would be done at a first look."""
        return self.look(desired, ledger)[0]

    def look(
        self,
        desired: Desired,
        ledger: Ledger,
        heard: dict[str, Report] | None = None,
        reached: dict[str, Health] | None = None,
    ) -> tuple[Plan, dict[str, Report]]:
        """Look at the host and plan; an SNA is asked at the first look of an apply, and whether it
        is well once, when the first run is to begin that needs it."""
        actual = self.host.look(desired, ledger)
        answers = {**(actual.appliances or {}), **(reached or {})}
        actual = replace(actual, appliances=answers)
        if reached is not None:
            reached |= answers
        if heard is None:
            heard = ended_by_word(ledger, actual, desired.vms)
        else:
            actual = replace(actual, reports=heard)
        self.host.note_sightings(ledger, actual)
        busy = {server.mark.key for server in actual.servers if server.clients}
        self.host.records.clients_seen([one for one in ledger.leases if one.key in busy])
        return plan(desired, actual, ledger, self.host.now()), heard

    def done(self, step: Step) -> None:
        self.counts["steps"] += 1
        self.after_step()

    def crash(self) -> None:
        """The process that is at work ends; what it was about to do is not done."""
        self.counts["crashes"] += 1
        self.pending, self.planned, self.stale = None, None, False
        self.host.crash()

    def burning(self, burns: int, work: Callable[[], None]) -> None:
        """Do it, and crash after so many steps of it; a step is any touch of the host."""
        self.host.fuse.left = burns
        try:
            work()
        except Crash:
            self.crash()
        self.host.fuse.left = None

    def begin(self) -> None:
        """Somebody looks, and takes a moment to act."""
        self.pending = self.applying(dict(self.vms))
        next(self.pending, None)

    def finish(self) -> None:
        """Who has looked acts."""
        pending, self.pending, self.planned = self.pending, None, None
        self.raced |= self.stale
        for _ in pending or ():
            pass
        self.stale = False

    def forget(self) -> None:
        """The ledger that knew all of this is gone, and with it what nothing else tells of."""
        self.ended.clear()
        self.backups.clear()
        self.amnesia = True

    def hears_news(self) -> bool:
        """Whether an apply would learn something about a call that the last one did not know."""
        planned = self.plan(self.desired(), self.host.records.ledger())
        return any(isinstance(action, Witness | Conclude) for action in planned.actions)

    # -- what happens by itself

    def connect(self, job: str, sna: FakeSna) -> None:
        """The writer of a job goes to every target that it was told, and writes there."""
        post = next(post for post in reversed(sna.posts) if post.request["job_id"] == job)
        for pair in post.request["nbd_targets"].split(","):
            address, name = pair.split("nbd://")[1].split("/")
            port = int(address.rsplit(":", 1)[1])
            for process in self.host.processes.values():
                if process.port == port and process.name == name and not process.served.starting:
                    process.clients = 2
                    self.write(process)

    def write(self, process: Process) -> None:
        if process.argv[-1] in self.host.images and process.writes:
            self.host.write(process)

    def wake(self) -> None:
        """What was delivered late is done now."""
        for sna in self.snas:
            late = list(sna.late)
            sna.wake()
            for job in late:
                self.connect(job, sna)

    def leave(self) -> None:
        """The strangers go, and take with them what is theirs."""
        self.host.listeners.clear()
        self.host.unseen.clear()
        for process in list(self.host.processes.values()):
            if not self.host.is_ours(process):
                del self.host.processes[process.identity]
        for path in self.files:
            del self.host.images[path]
        self.files.clear()
        self.foreign = strangers(self.host)

    def calm(self) -> None:
        """All that stood in the way goes."""
        host = self.host
        self.leave()
        for process in host.mine():
            process.clients, process.silent, process.unflushed = 0, False, False
        for path, image in self.moved.items():
            if path not in host.images:
                host.images[path] = image
                for process in host.mine():
                    process.detached &= process.argv[-1] != path
        self.moved.clear()
        host.failing.clear()
        host.unreadable.clear()
        for sna in self.snas:
            sna.script.clear()
            sna.deaf = sna.down = False
        host.clock += RESYNC
        self.settings = replace(self.settings, ports=PortRange.parse(ENOUGH))
        host.settings = self.settings
        self.vms = {name: replace(vm, protect=False) for name, vm in self.vms.items()}

    def wanted(self, vm: Vm) -> tuple[Export, ...]:
        """What should be served of a VM when all is well."""
        ledger = self.host.records.ledger()
        call = ledger.active(vm.name)
        if call:
            return call.exports
        if not vm.exported:
            return ()
        latest = ledger.latest(vm.name, vm.run)
        if latest and latest.state.terminal:
            return (latest.exports or vm.exports) if vm.release == "keep" else ()
        return vm.exports


def _at(vm: Vm, ledger: Ledger) -> Vm:
    """A VM as it is wanted now: for the attempt that its run is at."""
    attempt = ledger.attempt(vm.name, vm.run)
    exports = tuple(
        replace(
            export,
            attempt=attempt,
            name=attempted(export.name, attempt),
            image=attempted_image(export.image, attempt),
        )
        for export in vm.exports
    )
    return replace(vm, exports=exports)
