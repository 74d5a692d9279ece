"""What a reading of the watched directory means: what stays as it was, and what may go.

Two rules. What cannot be read is not gone: its VMs stay at their last applied state. What is gone
is removed only where that is wanted, after two equal clean readings, and not too much at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.desired import Desired, Vm, at_attempt
from reconciler.core.errors import Diagnostic
from reconciler.core.ledger import Applied, Declaration, Ledger
from reconciler.core.settings import Loop, Settings
from reconciler.core.tunnel import Tunnel
from reconciler.core.units import Seconds, stamp

APART: Final[Seconds] = 2.0
"""At least so long after the first clean reading comes the second that confirms a removal: longer
than any copy of a directory file by file is seen to stand still."""
SOON: Final[Seconds] = 0.2
"""When to read again after files moved during a reading."""
SHORT: Final = 12
"""Characters of a digest or a commit by which people name a revision."""
NO_SPEC: Final = "no spec declares it any more"
"""The order by which a VM that is gone from the files is to be absent."""
UNREADABLE: Final = ("SourceUnreadable", "EmptySource")
"""Reasons of the condition SourceUnreadable; any other hold is a PruneHeld."""


class Revision(Struct, frozen=True, kw_only=True):
    """One content of the directory, and where it comes from, if Git knows."""

    digest: str = ""
    """Of the names and contents of all spec files; SHA-256, hexadecimal."""
    commit: str = ""
    author: str = ""
    subject: str = ""
    dirty: bool = False
    """The files are not as the commit has them."""

    @property
    def name(self) -> str:
        """What people call it: the commit, where it says what is there; else the digest."""
        return (self.digest if self.dirty or not self.commit else self.commit)[:SHORT]

    def to_json(self) -> dict[str, Any]:
        names = self.__struct_fields__
        return {**{name: getattr(self, name) for name in names}, "name": self.name}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Revision:
        return cls(**{name: value[name] for name in cls.__struct_fields__ if name in value})


class Held(Struct, frozen=True):
    """Why a VM stays at its last applied state, whatever the files say or do not say."""

    reason: str
    message: str

    @property
    def condition(self) -> str:
        return condition_of(self.reason)


def condition_of(reason: str) -> str:
    """The type of the condition that says why a VM is held."""
    return "SourceUnreadable" if reason in UNREADABLE else "PruneHeld"


class Stale(Struct, frozen=True):
    """Why an inventory is not of now, and of when it is."""

    error: str
    since: Seconds = 0.0
    """When it was read last; 0: it never was, so nothing is known."""

    def __str__(self) -> str:
        since = f"was read last at {stamp(self.since)}" if self.since else "was never read"
        return f"it {since}, and cannot be read now: {self.error}"


def stale_told(source: Mapping[str, Any]) -> str:
    """Why no run may begin, by what is remembered of a reading; empty: nothing speaks against."""
    known = source.get("inventory") or {}
    if not known.get("error"):
        return ""
    return f"the inventory {known['origin']}: {Stale(known['error'], known['since'])}"


def read_well(source: Mapping[str, Any]) -> bool:
    """Whether a reading, as it is remembered, was of all that there is, and of today."""
    fetch, inventory = source.get("fetch") or {}, source.get("inventory") or {}
    good = not source.get("unread") and not fetch.get("fetch_error")
    return good and not inventory.get("error")


class Found(Struct, frozen=True, kw_only=True):
    """What one reading of the directory came to. Files are named as they are below it."""

    directory: str
    """Absolute, as it was named; it may be a symlink."""
    revision: Revision
    named: Mapping[str, str] = field(default_factory=dict)
    """VM → the file that declares it; also those with an error."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """File, or folder with a slash at its end → why not all of it could be read, and where."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """VM → what is wrong with its declaration, and where."""
    identities: frozenset[tuple[str, str]] = frozenset()
    """(vCenter, path) of every VM that is to be exported."""
    trouble: str = ""
    """Why the directory as a whole is not believed: it is missing, unreadable or empty."""
    settled: bool = True
    """Nothing moved while it was read."""

    @property
    def clean(self) -> bool:
        """It says all that there is to say."""
        return self.settled and not self.trouble and not self.unread


class Decision(Struct, frozen=True, kw_only=True):
    """What follows from a reading, beside what the specs themselves say."""

    holds: Mapping[str, Held] = field(default_factory=dict)
    """VMs that stay at their last applied state; what was never applied is left alone."""
    removed: frozenset[str] = frozenset()
    """VMs that are to be absent because they are gone from the files."""
    leaving: frozenset[str] = frozenset()
    """VMs that are gone from the files and absent already, but for what holds their end."""
    declared: tuple[Declaration, ...] = ()
    """To be written down."""
    forget: tuple[str, ...] = ()
    """VMs about which nothing more is to be remembered of the directory."""
    again: Seconds | None = None
    """When to read again although nothing happens."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """To be written down: what was read, for `status`, and for whoever reads next."""


def decide(found: Found, ledger: Ledger, loop: Loop, now: Seconds) -> Decision:
    """What stays, what goes and what is to be remembered. Same inputs, same decision."""
    source = _remembered(found, ledger.source, now)
    if found.trouble:
        held = Held("EmptySource", f"{found.trouble}; nothing is changed until it is back")
        holds = dict.fromkeys(ledger.declared, held)
        return Decision(holds=holds, source={**source, "held": _told(holds, ledger)})
    holds = {name: Held("SourceUnreadable", why) for name, why in found.errors.items()}
    holds.update(_unread(found, ledger))
    gone = sorted(ledger.declared.keys() - found.named.keys() - holds.keys())
    forget = [name for name in gone if found.clean and _at_rest(name, ledger)]
    known = [name for name in gone if name not in forget and name in ledger.applied]
    leaving = {name for name in known if _absent(name, ledger)}
    going = [name for name in known if name not in leaving]
    removed = _removals(found, ledger, loop, going, holds, source, now)
    first = source["clean"].get("since", now)
    pending = any(holds[name].reason == "Unconfirmed" for name in going if name in holds)
    again = first + APART if pending and found.clean else None
    return Decision(
        holds=holds,
        removed=frozenset(removed),
        leaving=frozenset(leaving),
        declared=tuple(_declarations(found, ledger, holds, (*leaving, *going), now)),
        forget=tuple(forget),
        again=again if found.settled else now + SOON,
        source={**source, "held": _told(holds, ledger)},
    )


def _removals(
    found: Found,
    ledger: Ledger,
    loop: Loop,
    going: Iterable[str],
    holds: dict[str, Held],
    source: dict[str, Any],
    now: Seconds,
) -> set[str]:
    """Which of the VMs that are gone are to be absent; `holds` and `source` get the others."""
    candidates: set[str] = set()
    for name in going:
        why = _kept(name, found, ledger, loop, source, now)
        if why:
            holds[name] = why
        else:
            candidates.add(name)
    digest = found.revision.digest
    spent = set(source["removed"].get("vms", ())) if found.clean else set()
    total, asked = len(ledger.declared.keys() | spent), candidates | spent
    limit = loop.max_delete.of(total)
    if len(asked) <= limit or ledger.source.get("approved") == digest:
        if candidates:
            source["removed"] = {"digest": digest, "vms": sorted(asked)}
        return candidates
    over = candidates - spent
    for name in over:
        holds[name] = Held(
            "TooMany",
            f"{NO_SPEC}, like {len(asked)} of {total} VMs since revision {found.revision.name}; "
            f"without a person's word at most {limit} go ({loop.max_delete}): "
            f"reconciler approve {found.revision.name}",
        )
    if over:
        source["waiting"] = {
            "digest": digest,
            "name": found.revision.name,
            "commit": "" if found.revision.dirty else found.revision.commit,
            "vms": sorted(over),
            "limit": limit,
        }
    return candidates & spent


def _kept(
    name: str, found: Found, ledger: Ledger, loop: Loop, source: Mapping[str, Any], now: Seconds
) -> Held | None:
    """Why one VM that is gone from the files stays; None: nothing but their number may hold it."""
    applied = ledger.applied[name].vm
    if found.unread:
        file, why = min(found.unread.items())
        said = f"{NO_SPEC}, but {file} cannot be read and may do so: {why}"
        return Held("SourceUnreadable", said)
    if identity(applied) in found.identities:
        said = f"{NO_SPEC} under this name; the same VM is declared under another: see `explain`"
        return Held("Renamed", said)
    if not loop.prune:
        said = f"{NO_SPEC}, and it stays as it was; to end it: reconciler stop {name}"
        return Held("PruneDisabled", f"{said}, or write `loop: {{prune: true}}` into the config")
    first = source["clean"].get("since", now)
    if now - first < APART:  # and so where this reading is not clean: then there was no first
        said = f"{NO_SPEC}; it is removed if another reading says the same"
        return Held("Unconfirmed", said)
    return None


def _unread(found: Found, ledger: Ledger) -> dict[str, Held]:
    """The VMs of files that could not be read, or not to their end."""
    holds = {}
    names = ledger.declared.keys() | ledger.applied.keys() | ledger.tunnels.keys()
    for name in names if found.unread else ():
        file = _file_of(name, found, ledger)
        unread = next((one for one in _around(file) if one in found.unread), None)
        if unread and found.named.get(name) != file:
            holds[name] = Held("SourceUnreadable", found.unread[unread])
    return holds


def _file_of(name: str, found: Found, ledger: Ledger) -> str:
    """Where a VM was declared; where it was applied from, if that was not in this directory."""
    if name in ledger.declared:
        return ledger.declared[name].file
    place = str((ledger.applied.get(name) or ledger.tunnels[name]).vm.get("place", ""))
    return place.rsplit(":", 2)[0].removeprefix(f"{found.directory}/")


def _around(file: str) -> Iterable[str]:
    """A file, and every folder that it is in, as `found.unread` names them."""
    yield file
    while "/" in file.rstrip("/"):
        file = f"{file.rstrip('/').rsplit('/', 1)[0]}/"
        yield file


def _absent(name: str, ledger: Ledger) -> bool:
    """Whether a VM is to be absent already."""
    return not ledger.applied[name].vm.get("exported")


def _at_rest(name: str, ledger: Ledger) -> bool:
    """Whether nothing of a VM is left that would have to be stopped."""
    if name not in ledger.applied:
        return True
    return _absent(name, ledger) and not ledger.of(name) and not ledger.active(name)


def _declarations(
    found: Found,
    ledger: Ledger,
    holds: Mapping[str, Held],
    gone: Iterable[str],
    now: Seconds,
) -> Iterable[Declaration]:
    """What is not yet written down of who declares what."""
    revision = found.revision.digest
    for name, file in found.named.items():
        known = ledger.declared.get(name)
        if known and known.file in found.unread and name in holds:
            continue  # it belongs there until that file can be read again
        if not known or known.file != file or known.gone:
            yield Declaration(vm=name, file=file, revision=revision, at=now)
    for name in gone:
        if found.clean and not ledger.declared[name].gone:
            yield replace(ledger.declared[name], gone=now)


def _remembered(found: Found, before: Mapping[str, Any], now: Seconds) -> dict[str, Any]:
    """What is remembered of a reading, but for who is held: that follows."""
    revision, digest = found.revision.to_json(), found.revision.digest
    known = before.get("revision") or {}
    if found.trouble:  # what was read last is what holds
        revision, digest = known or {}, str(known.get("digest", ""))
    clean: dict[str, Any] = before.get("clean") or {}
    if not found.clean:
        clean = {}
    elif clean.get("digest") != digest or clean.get("since", now) > now:
        clean = {"digest": digest, "since": now}
    removed = before.get("removed") or {}
    unread = {"": found.trouble} if found.trouble else dict(found.unread)
    return {
        "directory": found.directory,
        "revision": revision,
        "at": before.get("at", now) if known.get("digest") == digest else now,
        "unread": unread,
        "unread_since": (before.get("unread_since") or now) if unread else 0.0,
        "clean": clean,
        "removed": removed if removed.get("digest") == digest else {},
        "waiting": {},
    }


def _told(holds: Mapping[str, Held], ledger: Ledger) -> dict[str, list[str]]:
    """VM → reason and message, of those that there is something to hold of."""
    return {
        name: [held.reason, held.message]
        for name, held in sorted(holds.items())
        if name in ledger.applied or name in ledger.tunnels
    }


def settled(
    built: Desired,
    decision: Decision,
    ledger: Ledger,
    outdated: Callable[[Vm], str] = lambda _: "",
) -> Desired:
    """What is desired, once it is decided what stays and what goes.

    `outdated`: why a VM cannot be backed up as it was applied last; empty: it can.
    """
    old: dict[str, str] = {}
    vms = {name: vm for name, vm in built.vms.items() if name not in decision.holds}
    errors = [one.vm for one in built.diagnostics if one.severity == "error" and one.vm]
    for name in (*decision.holds, *decision.leaving, *errors):
        last = last_applied(name, ledger, built.settings)
        if name not in vms and last:
            vms[name] = last
            why = outdated(last)
            if why:
                old[name] = why
    for name in decision.removed:
        if name in ledger.applied:
            vms[name] = removal(name, ledger.applied[name])
    tunnels = dict(built.tunnels)
    for name in (*decision.holds, *errors):
        if name not in tunnels and name in ledger.tunnels:
            tunnels[name] = Tunnel.from_json(ledger.tunnels[name].vm)
    return replace(built, vms=vms, tunnels=tunnels, outdated=old)


def last_applied(name: str, ledger: Ledger, settings: Settings) -> Vm | None:
    """The last applied state of a VM, at its present attempt; None: it has none that can be kept.

    A VM that may still have to be called for needs the SNA and the vCenter that it names.
    """
    applied = ledger.applied.get(name)
    if applied is None:
        return None
    vm = Vm.from_json(applied.vm)
    if not vm.exported or vm.purpose != "backup":
        return vm
    call = ledger.latest(name, vm.run)
    due = call is None or not (call.state.active or call.state.terminal)
    if due and (vm.sna not in settings.snas or vm.vcenter not in settings.vcenters):
        return None
    if call is None or call.attempt == 1:
        return vm
    first = ledger.find(name, vm.run, 1)
    exports = (first and first.exports) or vm.exports
    return replace(vm, exports=tuple(at_attempt(one, call.attempt) for one in exports))


def removal(name: str, applied: Applied) -> Vm:
    """A VM that is to be absent, as no spec declares it any more."""
    protect = bool(applied.vm.get("protect"))
    return Vm(name=name, exported=False, protect=protect, order=NO_SPEC)


def without_the_rest(desired: Desired, ledger: Ledger) -> Desired:
    """The same, and all that was ever applied and is not desired is to be absent: an order.

    Not where something cannot be read: what seems to be gone may be in there. A VM that has only
    been given another name is not stopped and begun anew: see `plan.renamed`.
    """
    if desired.failed:
        return desired
    kept = {*desired.vms, *desired.untouched, *desired.idle}
    same = identities(desired)
    gone = {
        name: removal(name, applied)
        for name, applied in ledger.applied.items()
        if name not in kept and identity(applied.vm) not in same
    }
    return replace(desired, vms={**desired.vms, **gone})


def identity(vm: Mapping[str, Any]) -> tuple[str, str]:
    """(vCenter, path) of a VM as it was applied."""
    return str(vm.get("vcenter", "")), str(vm.get("path", ""))


def identities(desired: Desired) -> frozenset[tuple[str, str]]:
    """(vCenter, path) of all that is to be exported."""
    return frozenset(
        (vm.vcenter, vm.path) for vm in desired.vms.values() if vm.exported and vm.path
    )


def errors(diagnostics: Iterable[Diagnostic], used: Iterable[str]) -> dict[str, str]:
    """VM → the first error about it, with its place, of all VMs that are not used."""
    known, found = set(used), dict[str, str]()
    for one in diagnostics:
        if one.severity == "error" and one.vm and one.vm not in known:
            found.setdefault(one.vm, told(one))
    return found


def told(one: Diagnostic) -> str:
    """`file:line:column: what is wrong`."""
    return f"{one.place}: {one.summary}" if one.place else one.summary
