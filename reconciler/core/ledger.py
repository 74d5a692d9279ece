"""What cannot be looked at and is therefore remembered: port leases, calls, what was applied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Final, TypeAlias, overload

from msgspec import Struct, field
from msgspec.structs import force_setattr, replace

from reconciler.core.call import Call, CallState, Report
from reconciler.core.desired import Export
from reconciler.core.tunnel_seen import Dialled
from reconciler.core.units import Bytes, Port, Seconds


class Lease(Struct, frozen=True, kw_only=True):
    """A port that belongs to one disk of one run, from before its server until after it."""

    hub: str
    vm: str
    disk: int
    run: str
    attempt: int
    port: Port
    since: Seconds
    started: bool = False
    """A server of it once answered; if none is there, it died."""
    clients_seen: bool = False
    restarts: int = 0
    safe: bool = False
    """Its server was started so that nothing it acknowledges can be lost (write-through)."""
    up: Seconds = 0.0
    """When its server answered the last time that one was started; 0: none did."""
    deaths: int = 0
    """How often in a row its server ended soon after it was up."""
    rest: Seconds = 0.0
    """Until when it is not started again; 0: at once."""

    @property
    def key(self) -> tuple[str, int, str, int]:
        return (self.vm, self.disk, self.run, self.attempt)


class Applied(Struct, frozen=True, kw_only=True):
    """The last applied desired state of one VM."""

    vm: Mapping[str, Any]
    generation: int
    at: Seconds


class Pause(Struct, frozen=True, kw_only=True):
    """An operator's order to leave a VM as it is; see `reconciler pause`."""

    vm: str
    """Or `EVERY`."""
    reason: str
    since: Seconds
    until: Seconds = 0.0
    """When it ends by itself; 0: never."""
    who: str = ""


EVERY: Final = "*"
"""The name under which a pause is for every VM. No VM can have it."""


class Declaration(Struct, frozen=True, kw_only=True):
    """What the watched directory said of a VM when it was read last."""

    vm: str
    file: str
    """Which file declares it."""
    revision: str
    """Of the source, at which it was read there."""
    at: Seconds
    gone: Seconds = 0.0
    """Since when a directory that could be read does not name it any more; 0: it does."""


class DiskReport(Struct, frozen=True, kw_only=True):
    """An SNA's client said that one disk has arrived. Its first word counts."""

    job_id: str
    position: int
    change_id: str
    bytes: Bytes
    """What the client says that it transferred; not what is allocated."""
    at: Seconds


class Telemetry(Struct, frozen=True, kw_only=True):
    """The last word of an SNA's client about a job. It never ends a run."""

    job_id: str
    first: Seconds
    """When the first word came."""
    at: Seconds
    status: str
    phase: str
    bytes: Bytes
    total: Bytes
    speed: Bytes
    """Bytes per second."""
    percent: float
    error: str


class Word(Struct, frozen=True, kw_only=True):
    """What an SNA's status said last of a job; it ends a run only with `reports_end`."""

    report: Report
    since: Seconds
    """When it said so first."""


class Archived(Struct, frozen=True, kw_only=True):
    """One disk's image of a published run, as it was when the run was published."""

    job_id: str
    position: int
    size: Bytes
    """Of the disk: what a guest sees."""
    allocated: Bytes
    """What the file takes on its file system."""
    digest: str
    """`sha256:…` of the file; empty: none was taken."""
    at: Seconds
    removed: Seconds = 0.0
    """When its removal was decided; 0: it is kept."""


VERIFY: Final = "verify"
"""The kind of proof that `reconciler verify` writes down, of a run's own images."""
RESTORE: Final = "restore"
"""The kind of proof that a restore test writes down."""


class Proof(Struct, frozen=True, kw_only=True):
    """The last time that somebody looked whether a published run can be used."""

    job_id: str
    kind: str
    """`verify`: its images were checked; `restore`: its disks were read as one reads a disk."""
    at: Seconds
    ok: bool
    result: str
    """A JSON object: what was found."""
    who: str


class Kept(Struct, frozen=True):
    """What is known of a published run besides its call."""

    archived: Mapping[int, Archived] = field(default_factory=dict)
    """By position; empty: it was published before that was written down."""
    reports: Mapping[int, DiskReport] = field(default_factory=dict)
    """By position."""
    heard: Telemetry | None = None
    """The last word about the job, with the moment of the first; None: there was none."""
    proofs: Mapping[str, Proof] = field(default_factory=dict)
    """By kind."""

    @property
    def removed(self) -> Seconds:
        """When the removal of its images was decided; 0: they are kept."""
        return max((one.removed for one in self.archived.values()), default=0.0)


class Shelf:
    """What is known of published runs; loaded when it is asked for, as few looks need it."""

    def __init__(self, load: Callable[[Sequence[str]], Mapping[str, Kept]] | None = None) -> None:
        self._load = load or (lambda _jobs: {})
        self._known: dict[str, Kept] = {}

    def of(self, jobs: Iterable[str]) -> Mapping[str, Kept]:
        """Job id → what is known of it; of each job something, if it is nothing at all."""
        wanted = list(jobs)
        missing = [job for job in dict.fromkeys(wanted) if job not in self._known]
        if missing:
            self._known |= {job: Kept() for job in missing} | dict(self._load(missing))
        return {job: self._known[job] for job in wanted}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shelf)  # how much of it is loaded makes no other ledger

    __hash__ = None  # type: ignore[assignment]

    def get(self, job: str) -> Kept:
        """What is known of one job."""
        return self.of([job])[job]


class Sighting(Struct, frozen=True):
    """Every disk of a run had a client: since when, and what its images took then."""

    at: Seconds
    allocated: Bytes


Head: TypeAlias = tuple[str, str, int, str, Seconds]
"""What is known of a call before it is loaded: VM, run, attempt, state, when it changed last."""
Load: TypeAlias = Callable[[Sequence[Head]], Iterable[Call]]
"""Gets the calls of some heads, in their order."""


def head_of(call: Call) -> Head:
    return (*call.key, str(call.state), call.changed)


_ENDED: Final = frozenset(str(state) for state in CallState if state.terminal)


class Calls(Sequence[Call]):
    """All calls of a hub, in the order in which they were first written down.

    Those that have ended stay for ever and are seldom asked for. They do not change any more, so
    each is loaded when it is asked for: a look at 10,000 calls reads some hundred of them.
    """

    NEWEST: Final = 2
    """Calls of each VM that a look is likely to ask for: the wanted run and its parent."""

    def __init__(self, heads: Iterable[Head], load: Load) -> None:
        self._heads, self._load = list(heads), load
        self._loaded: dict[int, Call] = {}

    @classmethod
    def of(cls, calls: Iterable[Call]) -> Calls:
        """Of calls that are there."""
        return cls([], lambda _heads: ()).put(calls)

    def put(self, calls: Iterable[Call]) -> Calls:
        """The same with these calls, in the place of those that they replace or at the end."""
        given = {call.key: call for call in calls}
        return self._moved({key: head_of(call) for key, call in given.items()}, given)

    def renewed(self, heads: Iterable[Head]) -> Calls:
        """The same with some heads as they are now; what has moved is loaded again when it is
        asked for. Costs what has moved, and a copy of the list."""
        return self._moved({head[:3]: head for head in heads}, {})

    def _moved(
        self, fresh: Mapping[tuple[str, str, int], Head], calls: Mapping[tuple[str, str, int], Call]
    ) -> Calls:
        found = Calls(list(self._heads), self._load)
        found._loaded = dict(self._loaded)
        by_vm, unended = dict(self._by_vm), set[int]()
        was: set[int] = set()
        for key, head in fresh.items():
            vm, run, attempt = key
            runs = by_vm.get(vm, {})
            there = runs.get(run, [])
            number = next((one for one in there if found._heads[one][2] == attempt), None)
            if number is None:
                number = len(found._heads)
                found._heads.append(head)
                by_vm[vm] = {**runs, run: [*there, number]}
            else:
                if found._heads[number] != head or head[3] not in _ENDED:
                    found._loaded.pop(number, None)
                found._heads[number] = head
            if key in calls:
                found._loaded[number] = calls[key]
            was.add(number)
            if head[3] not in _ENDED:
                unended.add(number)
        left = [one for one in self._unended if one not in was]
        found.__dict__["_by_vm"] = by_vm
        found.__dict__["_unended"] = sorted({*left, *unended}) if unended else left
        return found

    def fetch(self, numbers: Iterable[int], load: Load | None = None) -> list[Call]:
        """Some of the calls; those that are not loaded yet are loaded in one go."""
        wanted = list(numbers)
        missing = [number for number in wanted if number not in self._loaded]
        if missing:
            loaded = (load or self._load)([self._heads[number] for number in missing])
            self._loaded.update(zip(missing, loaded, strict=True))
        return [self._loaded[number] for number in wanted]

    def warm(self, load: Load) -> None:
        """Load what most looks ask for, by other means: those are of the moment of the heads."""
        newest = [sorted(chain(*runs.values()))[-self.NEWEST :] for runs in self._by_vm.values()]
        self.fetch(sorted({*self._unended, *chain(*newest)}), load)

    @overload
    def __getitem__(self, number: int) -> Call: ...
    @overload
    def __getitem__(self, number: slice) -> list[Call]: ...
    def __getitem__(self, number: int | slice) -> Call | list[Call]:
        chosen = range(len(self))[number]
        return self.fetch(chosen) if isinstance(chosen, range) else self.fetch([chosen])[0]

    def __iter__(self) -> Iterator[Call]:
        return iter(self.fetch(range(len(self))))

    def __len__(self) -> int:
        return len(self._heads)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"Calls({list(self)!r})"

    @cached_property
    def _by_vm(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """VM → run → where its attempts are."""
        found: dict[str, dict[str, list[int]]] = {}
        for number, (vm, run, *_) in enumerate(self._heads):
            found.setdefault(vm, {}).setdefault(run, []).append(number)
        return found

    @cached_property
    def _unended(self) -> Sequence[int]:
        return [number for number, head in enumerate(self._heads) if head[3] not in _ENDED]

    @cached_property
    def open(self) -> Sequence[Call]:
        """The calls that have not ended."""
        return self.fetch(self._unended)

    @property
    def newest(self) -> Sequence[Call]:
        """The last call of each VM."""
        return self.fetch(sorted(max(chain(*runs.values())) for runs in self._by_vm.values()))

    def newest_of(self, vm: str) -> Call | None:
        """The last call of a VM."""
        runs = self._by_vm.get(vm)
        return self[max(chain(*runs.values()))] if runs else None

    @property
    def vms(self) -> frozenset[str]:
        """Every VM that a call was ever for."""
        return frozenset(self._by_vm)

    def of_vm(self, vm: str) -> Sequence[Call]:
        """Every call of a VM."""
        return self.fetch(sorted(chain(*self._by_vm.get(vm, {}).values())))

    def find(self, vm: str, run: str, attempt: int) -> Call | None:
        """One attempt of a run."""
        found = self._by_vm.get(vm, {}).get(run, ())
        number = next((one for one in found if self._heads[one][2] == attempt), None)
        return None if number is None else self[number]

    def latest(self, vm: str, run: str) -> Call | None:
        """The newest attempt of a run."""
        found = self._by_vm.get(vm, {}).get(run, ())
        newest = max(found, key=lambda number: self._heads[number][2], default=None)
        return None if newest is None else self[newest]

    def heads_of(self, vm: str) -> tuple[Head, ...]:
        """The heads of the calls of a VM."""
        return tuple(self._heads[number] for number in chain(*self._by_vm.get(vm, {}).values()))

    def completed_runs(self, vm: str) -> list[str]:
        """The runs of a VM that are backups, in the order in which they ended."""
        heads = (self._heads[number] for number in chain(*self._by_vm.get(vm, {}).values()))
        done = [head for head in heads if head[3] == CallState.COMPLETED]
        return [head[1] for head in sorted(done, key=lambda head: head[4])]


class Ledger(Struct, frozen=True, kw_only=True, dict=True):
    """One consistent reading of the store."""

    hub: str
    state_id: str
    leases: tuple[Lease, ...] = ()
    calls: Sequence[Call] = ()
    """All of them. Who only needs those that have not ended asks `open`: that is cheap."""
    applied: Mapping[str, Applied] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    transitions: Mapping[tuple[str, str], tuple[str, str, Seconds]] = field(default_factory=dict)
    """(VM, condition type) → status, reason, since when."""
    failures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """VM → (reason, message) of what its last apply could not do; gone when one could."""
    reports: Mapping[str, Mapping[int, DiskReport]] = field(default_factory=dict)
    """Job id of an open call, or of a VM's newest → position → what was reported."""
    telemetry: Mapping[str, Telemetry] = field(default_factory=dict)
    """Job id of an open call → the last word about it."""
    words: Mapping[str, Word] = field(default_factory=dict)
    """Job id of an active call → what its SNA said of it last, if it was asked."""
    sightings: Mapping[str, Sighting] = field(default_factory=dict)
    """Job id of a call whose outcome is unknown → when clients were first seen on all disks."""
    pauses: Mapping[str, Pause] = field(default_factory=dict)
    """VM, or `EVERY` → its pause, also one whose time is over."""
    declared: Mapping[str, Declaration] = field(default_factory=dict)
    """VM → what the watched directory says of it."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """What was read of the watched directory last: see core/source.py. Empty: none is watched."""
    shelf: Shelf = field(default_factory=Shelf)
    """What is known of published runs besides their calls."""
    tunnels: Mapping[str, Applied] = field(default_factory=dict)
    """`tunnel/NAME` → its last applied desired state."""
    dialled: Mapping[tuple[str, str], Dialled] = field(default_factory=dict)
    """(`tunnel/NAME`, part) → what is remembered of that connection."""
    busy: str = ""
    """Who is changing the hub while this is read; nobody, if the reader holds the lock."""

    def __post_init__(self) -> None:
        if not isinstance(self.calls, Calls):
            force_setattr(self, "calls", Calls.of(self.calls))

    @property
    def _calls(self) -> Calls:
        assert isinstance(self.calls, Calls)
        return self.calls

    @cached_property
    def _leases_of(self) -> Mapping[str, tuple[Lease, ...]]:
        found: dict[str, list[Lease]] = {}
        for lease in self.leases:
            found.setdefault(lease.vm, []).append(lease)
        return {vm: tuple(leases) for vm, leases in found.items()}

    @cached_property
    def _active(self) -> Mapping[str, Call]:
        found: dict[str, Call] = {}
        for call in self.open:
            if call.state.active:
                found.setdefault(call.vm, call)
        return found

    def of(self, vm: str) -> tuple[Lease, ...]:
        return self._leases_of.get(vm, ())

    def paused(self, vm: str, now: Seconds) -> Pause | None:
        """The pause that holds for a VM now; its own before that of every VM."""
        for pause in (self.pauses.get(vm), self.pauses.get(EVERY)):
            if pause and (not pause.until or pause.until > now):
                return pause
        return None

    @property
    def open(self) -> Sequence[Call]:
        """The calls that have not ended: DUE, REJECTED and the active ones."""
        return self._calls.open

    @property
    def known(self) -> frozenset[str]:
        """Every VM that was ever applied or called for, and every tunnel."""
        return self._calls.vms | self.applied.keys() | self.tunnels.keys()

    @property
    def shown(self) -> dict[str, str]:
        """VM → its name in vCenter, as far as that was ever applied."""
        names = ((name, one.vm.get("display_name")) for name, one in self.applied.items())
        return {name: str(shown) for name, shown in names if shown}

    def context(self, name: str, known: Collection[str]) -> str:
        """The context among some that a name means; see `names.resolved`. Raises UsageError."""
        if name in known:
            return name
        from reconciler.core.names import resolved  # start-up does not pay for it

        return resolved(name, known, self.shown)

    def runs(self, vm: str) -> Sequence[Call]:
        """Every call of a VM."""
        return self._calls.of_vm(vm)

    def version_of(self, vm: str) -> object:
        """Another value where what is wanted of a VM may be another, for the same files."""
        return self._calls.heads_of(vm), self.applied.get(vm), self.tunnels.get(vm)

    def latest(self, vm: str, run: str) -> Call | None:
        """The newest attempt of a run."""
        return self._calls.latest(vm, run)

    def find(self, vm: str, run: str, attempt: int) -> Call | None:
        """One attempt of a run."""
        return self._calls.find(vm, run, attempt)

    def attempt(self, vm: str, run: str) -> int:
        call = self.latest(vm, run)
        return call.attempt if call else 1

    def active(self, vm: str) -> Call | None:
        """The call of this VM that an SNA may be acting on."""
        return self._active.get(vm)

    def completed_runs(self, vm: str) -> list[str]:
        return self._calls.completed_runs(vm)

    def only(self, vms: Collection[str]) -> Ledger:
        """What is remembered of some VMs: enough for a plan that takes nothing from others."""
        return replace(
            self,
            leases=tuple(lease for lease in self.leases if lease.vm in vms),
            calls=Calls.of(call for vm in vms for call in self.runs(vm)),
            applied={vm: self.applied[vm] for vm in vms if vm in self.applied},
        )

    def put(self, calls: Iterable[Call]) -> Ledger:
        """The same with these calls, in the place of those that they replace or at the end."""
        return replace(self, calls=self._calls.put(calls))

    def renewed(self, heads: Iterable[Head]) -> Ledger:
        """The same with some calls as they are now; see `Calls.renewed`."""
        return replace(self, calls=self._calls.renewed(heads))

    def newest_of(self, vm: str) -> Call | None:
        """The last call of a VM."""
        return self._calls.newest_of(vm)

    def newest_completed(self, vm: str, key: int, root: str) -> Export | None:
        """The disk of the newest completed run below a repository's root."""
        for run in reversed(self.completed_runs(vm)):
            call = self.latest(vm, run)
            for export in call.exports if call else ():
                if export.key == key and export.image.startswith(f"{root}/"):
                    return export
        return None
