"""What an operator orders about what is remembered: a value, and how it is carried out.

An order is carried out by who holds the lock: the command itself, or the daemon that it is handed
to. Nothing here asks or prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Final, Literal

from msgspec import Struct
from msgspec.structs import replace

from reconciler import retaining
from reconciler.core.actual import Server
from reconciler.core.call import Call, CallEvent, CallState, ending, resolving, verdict
from reconciler.core.call_plan import LOST
from reconciler.core.chains import broken, chains_of
from reconciler.core.desired import Desired, Vm
from reconciler.core.disk_plan import export_key
from reconciler.core.errors import HostError, UsageError
from reconciler.core.guards import in_use
from reconciler.core.history import proof as document_of
from reconciler.core.ledger import EVERY, Ledger, Proof
from reconciler.core.ledger import Pause as Held
from reconciler.core.names import hint
from reconciler.core.plan import plan
from reconciler.core.proofs import merged
from reconciler.core.settings import Settings, below
from reconciler.core.tunnel import Tunnel
from reconciler.core.units import Seconds, stamp
from reconciler.core.vm_plan import incomplete, new_run
from reconciler.execute import archived
from reconciler.host import patience
from reconciler.host.images import Owner, claim, claimed_by
from reconciler.host.store import Event, Store
from reconciler.hub import EFFECT, NOT_ENDED, Hub
from reconciler.look import Observer

Verdict = Literal["accepted", "completed", "failed", "resend"]
"""What a person can say of a call."""
_EVENTS: Final = {
    "accepted": CallEvent.SAY_ACCEPTED,
    "completed": CallEvent.SAY_COMPLETED,
    "failed": CallEvent.SAY_FAILED,
    "resend": CallEvent.RESEND,
}


class Order(Struct, frozen=True, kw_only=True, tag=True):
    """One order; `vms` are those that are worth a look afterwards.

    Each has `carry_out(store, who, now, eyes)`: do it, and say what to tell the operator; raises
    ReconcilerError, and then nothing was done.
    """

    vms: tuple[str, ...] = ()


class Retry(Order, frozen=True, kw_only=True):
    """Ask again for a run that was refused or could not be sent."""

    def carry_out(self, store: Store, who: str, now: Seconds, _eyes: Observer) -> list[str]:
        (vm,) = self.vms
        calls = calls_of(store.ledger(), vm)
        ready = [c for c in calls if c.state in (CallState.REJECTED, CallState.DUE)]
        if not ready:
            newest = calls[-1]
            help_ = f"a run that has ended is not asked for again; for another: {new_run(vm)}"
            if newest.state.active:
                known = newest.state is CallState.ACCEPTED
                help_ = ending(newest) if known else resolving(newest)
            raise HostError(f"cannot retry run {newest.run} of {vm}: it is {newest.state}; {help_}")
        call = ready[-1]
        store.advance(call, CallEvent.REARM, now, retry_at=0.0, failures=0, message="")
        event = Event(vm=vm, run=call.run, reason="Rearmed", message="by order of retry")
        store.record([event], who, now)
        return [f"run {call.run} of {vm} is DUE again."]


class Approve(Order, frozen=True, kw_only=True):
    """Let one revision of the watched directory take away what is more than the cap allows.

    Of that revision alone: it is named by its digest or its commit, or by their beginning.
    """

    LEAST: ClassVar[int] = 7
    """Characters of a name. Fewer are a guess."""

    revision: str
    reason: str = ""

    def carry_out(self, store: Store, who: str, now: Seconds, _eyes: Observer) -> list[str]:
        waiting = store.ledger().source.get("waiting") or {}
        if not waiting:
            raise HostError(
                f"cannot approve {self.revision}: no revision waits for that; see reconciler status"
            )
        names = [str(waiting["digest"]), str(waiting["commit"])]
        exact = len(self.revision) >= self.LEAST
        if not (exact and any(name.startswith(self.revision) for name in names)):
            raise HostError(
                f"cannot approve {self.revision}: the one that waits is {waiting['name']}, which "
                f"takes away {len(waiting['vms'])} VMs ({', '.join(waiting['vms'][:8])}"
                f"{', …' if len(waiting['vms']) > 8 else ''})"
            )
        store.approve(names[0])
        said = f"revision {waiting['name']}, {len(waiting['vms'])} VMs"
        said += f": {self.reason}" if self.reason else ""
        store.record([Event(vm="", reason="Approved", message=said)], who, now)
        return [
            f"revision {waiting['name']} may take away: {', '.join(waiting['vms'])}.",
            "What is protected, in use or being written is held all the same.",
        ]


class Pause(Order, frozen=True, kw_only=True):
    """Leave some VMs as they are, until a moment or until they are resumed."""

    reason: str
    until: Seconds = 0.0
    """0: until they are resumed."""
    every: bool = False
    """Every VM, also those that come later; `vms` are those of now."""

    def carry_out(self, store: Store, who: str, now: Seconds, _eyes: Observer) -> list[str]:
        names = [EVERY] if self.every else list(dict.fromkeys(self.vms))
        ledger = store.ledger()
        if not self.every:
            pausable(names, ledger)
        store.pause(
            Held(vm=name, reason=self.reason, since=now, until=self.until, who=who)
            for name in names
        )
        until = f" until {stamp(self.until)}" if self.until else ""
        said = f"paused{until}: {self.reason}"
        events = [Event(vm=n, reason="Paused", message=said) for n in _told_of(names)]
        store.record(events, who, now)
        back = "--all" if self.every else " ".join(names)
        return [
            *(f"{'every VM' if name == EVERY else name} is {said}" for name in names),
            f"What runs goes on, and nothing is changed; to go on: reconciler resume {back}",
        ]


class Resume(Order, frozen=True, kw_only=True):
    """End pauses."""

    every: bool = False
    """All pauses, those of single VMs too."""

    def carry_out(self, store: Store, who: str, now: Seconds, _eyes: Observer) -> list[str]:
        ledger = store.ledger()
        names = sorted(ledger.pauses) if self.every else list(dict.fromkeys(self.vms))
        if not self.every:
            pausable(names, ledger)
        paused = [name for name in names if name in ledger.pauses]
        every = None if self.every else ledger.paused(EVERY, now)
        lasting = f"every VM is paused, by {every.who}: {every.reason}" if every else ""
        if every and not paused:
            raise HostError(
                f"cannot resume {', '.join(names)}: {lasting}; for all: reconciler resume --all"
            )
        store.resume(paused)
        events = [Event(vm=n, reason="Resumed", message="by order") for n in _told_of(paused)]
        store.record(events, who, now)
        words = {True: "is resumed", False: "was not paused"}
        said = [
            f"{'every VM' if name == EVERY else name} {words[name in paused]}" for name in names
        ]
        said += [f"{lasting}: nothing is changed before reconciler resume --all"] if every else []
        return said or ["no VM was paused"]


def pausable(names: Sequence[str], ledger: Ledger) -> None:
    """Whether this hub has these VMs. Raises UsageError."""
    known = {*ledger.known, *ledger.declared, *(lease.vm for lease in ledger.leases)}
    for name in names:
        if name not in known:
            near = hint(name, known, ledger.shown)
            near = near or f" (known here: {', '.join(sorted(known)) or 'none'})"
            raise UsageError(f"this hub has no VM {name!r}{near}")


def _told_of(names: Sequence[str]) -> list[str]:
    """The VMs whose events these are; empty: the hub's."""
    return ["" if name == EVERY else name for name in names]


def calls_of(ledger: Ledger, vm: str) -> Sequence[Call]:
    """The calls of a VM, oldest first; at least one. Raises UsageError."""
    calls = sorted(ledger.runs(vm), key=lambda c: (c.created, c.attempt))
    if not calls:
        near = hint(vm, ledger.known, ledger.shown)
        raise UsageError(f"the ledger has no run of a VM {vm!r}{near}")
    return calls


class Resolve(Order, frozen=True, kw_only=True):
    """Say what became of a call that was not seen to end."""

    verdict: Verdict
    reason: str
    key: tuple[str, str, int]
    """The call that the operator was shown."""
    state: CallState
    """How it stood then."""

    def carry_out(self, store: Store, who: str, now: Seconds, eyes: Observer) -> list[str]:
        (vm,) = self.vms
        ledger = store.ledger()
        call = open_call(ledger, vm)
        if (call.key, call.state) != (self.key, self.state):
            raise HostError(
                f"cannot resolve {vm}: meanwhile its run {call.run}, attempt {call.attempt}, is "
                f"{call.state}; look again: reconciler explain {vm}"
            )
        answerable(call, self.verdict)
        if self.verdict == "resend":
            _nobody_connected(eyes, ledger, call)
        changes: Mapping[str, Any] = {}
        told: list[str] = []
        if self.verdict == "completed":
            servers = _nothing_lost(eyes, ledger, call)
            hub = Hub(eyes.settings, eyes.environment, store, who)
            changes, told = _measured(hub, call, servers)
        if call.state is CallState.INTENDED:
            call = store.advance(call, CallEvent.CRASH, now)
        if self.verdict == "resend":
            take_over(eyes.settings, store, call)
            store.another_attempt(call, now, self.reason)
        else:
            store.advance(call, _EVENTS[self.verdict], now, message=self.reason, **changes)
        reason = f"Resolved{self.verdict.capitalize()}"
        said = "; ".join([self.reason, *told])
        store.record([Event(vm=vm, run=call.run, reason=reason, message=said)], who, now)
        return told


class Prove(Order, frozen=True, kw_only=True):
    """Write down what was found of published runs of one VM by looking at their images."""

    proofs: tuple[Proof, ...]

    def carry_out(self, store: Store, who: str, now: Seconds, _eyes: Observer) -> list[str]:
        (vm,) = self.vms
        ledger = store.ledger()
        runs = {call.job_id: call.run for call in ledger.runs(vm)}
        kept = ledger.shelf.of(proof.job_id for proof in self.proofs)
        noted = []
        for proof in self.proofs:
            known = kept.get(proof.job_id)
            if proof.job_id not in runs or known is None or known.removed:
                continue  # it went while it was looked at
            one = replace(merged(known.proofs.get(proof.kind), proof), who=who)
            store.prove(one)
            noted.append(one)
        # Whether a backup can be restored is told by all that it needs, as it is known by now.
        lacking = broken(chains_of(store.ledger(), vm))
        store.record(
            [_proved(vm, runs[one.job_id], one, lacking.get(one.job_id, "")) for one in noted],
            who,
            now,
        )
        return []


def _proved(vm: str, run: str, proof: Proof, lacks: str) -> Event:
    said = document_of(proof, lacks)
    ok = said["ok"]
    return Event(
        vm=vm,
        run=run,
        severity="Normal" if ok else "Warning",
        reason=f"{proof.kind.capitalize()}{'Passed' if ok else 'Failed'}",
        message=f"run {run}, {proof.kind}: {said['summary']}",
    )


class Retain(Order, frozen=True, kw_only=True):
    """Remove backups that their VMs' `keep` does not keep, as far as they were shown."""

    jobs: tuple[str, ...]
    """Job ids of what was shown."""

    def carry_out(self, store: Store, who: str, now: Seconds, eyes: Observer) -> list[str]:
        return retaining.carry_out(eyes.settings, store, self.vms, self.jobs, now, who)


class Cancel(Order, frozen=True, kw_only=True):
    """End the active runs of some VMs, whatever their SNAs do, so that they can be stopped."""

    kill_clients: bool = False
    call: Call | None = None
    """Not the active runs but this one, which may not have been called yet, or be no more than
    asked for."""

    def carry_out(self, store: Store, who: str, now: Seconds, eyes: Observer) -> list[str]:
        ledger = store.ledger()
        if self.call is None:
            self.refuse_early(ledger, eyes)
            for call in filter(None, map(ledger.active, self.vms)):
                self._end(store, call, now, "by order of stop")
            return []
        known = ledger.find(*self.call.key)
        if known is None:
            store.remember(self.call)  # so that it is never begun, whatever still asks for it
        call = known or self.call
        if call.state.terminal:
            raise HostError(
                f"cannot cancel run {call.run} of {call.vm}: it is {call.state} already"
            )
        if self.leaves(ledger):
            self.refuse_early(ledger, eyes)
        told = (
            "; its appliance cannot be told: whoever writes for it fails as its servers are gone"
            if call.state.active
            else ""
        )
        self._end(store, call, now, f"by order of {who}{told}")
        said = f"run {call.run} was {call.state}{told}"
        store.record([Event(vm=call.vm, run=call.run, reason="Cancelled", message=said)], who, now)
        return []

    def leaves(self, ledger: Ledger) -> bool:
        """Whether the servers of these VMs are to go: not where another run has them, and not where
        nothing was ever applied."""
        known = {*ledger.applied, *(lease.vm for lease in ledger.leases)}
        others = [ledger.active(vm) for vm in self.vms]
        mine = self.call.key if self.call else None
        return known.issuperset(self.vms) and all(one is None or one.key == mine for one in others)

    def _end(self, store: Store, call: Call, now: Seconds, message: str) -> None:
        if call.state is CallState.INTENDED:
            call = store.advance(call, CallEvent.CRASH, now)
        store.advance(call, CallEvent.CANCEL, now, message=message)

    def refuse_early(self, ledger: Ledger, eyes: Observer) -> None:
        """Say what would keep the servers from being stopped before the run is ended for good."""
        desired = stopped(self.vms, ledger, eyes.settings, kill_clients=self.kill_clients)
        actual = eyes.look(desired, ledger, ask=False, secrets=False)
        for action in plan(desired, actual, ledger, eyes.now()).actions:
            if action.kind == "refuse" or action.cause == "Protected":
                raise HostError(f"cannot stop {action.vm}: {action.why}; its run is not cancelled")
        for server in actual.servers:
            if server.mark.vm in desired.vms and server.clients and not self.kill_clients:
                raise HostError(
                    f"cannot stop {server.mark.vm}: {in_use(server)}, and its run is not "
                    "cancelled; to cut them off too, add --kill-clients"
                )


def stopped(
    vms: Sequence[str], ledger: Ledger, settings: Settings, *, kill_clients: bool
) -> Desired:
    """Some VMs are to be gone, whatever the specs say. Raises UsageError."""
    gone = {}
    down = {}
    known = {*ledger.applied, *ledger.tunnels, *(lease.vm for lease in ledger.leases)}
    for name in vms:
        if name in ledger.tunnels:
            down[name] = replace(Tunnel.from_json(ledger.tunnels[name].vm), up=False)
            continue
        if name not in known:
            near = hint(name, known, ledger.shown)
            near = near or f" (known here: {', '.join(sorted(known)) or 'none'})"
            raise UsageError(f"this hub never applied a VM {name!r}{near}")
        applied = ledger.applied.get(name)
        protect = bool(applied and applied.vm.get("protect"))
        gone[name] = Vm(
            name=name, exported=False, protect=protect, order="by order of `reconciler stop`"
        )
    return Desired(
        settings=settings, vms=gone, tunnels=down, kill_clients=kill_clients, ordered=True
    )


def open_call(ledger: Ledger, vm: str) -> Call:
    """The call of a VM about which something can be said. Raises HostError, UsageError."""
    call = ledger.active(vm)
    if call:
        return call
    newest = calls_of(ledger, vm)[-1]
    hint = f"; reconciler retry {vm} asks again" if newest.state is CallState.REJECTED else ""
    if newest.state.terminal:
        hint = f"; for another run: {new_run(vm)}"
    raise HostError(
        f"cannot resolve {vm}: no call of it is open; its newest run {newest.run} is "
        f"{newest.state}{hint}"
    )


def answerable(call: Call, verdict: Verdict) -> None:
    """Whether this can be said of a call at all. Raises HostError."""
    if not (call.tainted and verdict == "completed"):
        return
    why = "a server of it died under a client, so acknowledged writes may be gone"
    if call.reason == LOST:
        why = "its record was lost, and a server may have died under a client meanwhile"
    raise HostError(
        f"cannot call run {call.run} of {call.vm} completed: {why}; say so: {ending(call)}, "
        f"and ask for a new run: {new_run(call.vm)}"
    )


def take_over(settings: Settings, store: Store, call: Call) -> None:
    """By an operator's order, what another state directory claimed of this run is ours."""
    roots = set(settings.repositories.values())
    near = {root for root in roots for one in call.exports if below(root, one.image)}
    ours = Owner(store.state_id, store.home)
    for root in sorted(near or roots):
        patience.do(
            f"take over the claim of run {call.run} of {call.vm}",
            root,
            partial(_take_over_in, root, call, ours),
            EFFECT,
        )


def _take_over_in(root: str, call: Call, ours: Owner) -> None:
    owner = claimed_by(root, call.vm, call.run)
    if owner and owner != ours.state_id:
        claim(root, call.vm, call.run, ours, take_over=True)


def _nothing_lost(eyes: Observer, ledger: Ledger, call: Call) -> list[Server]:
    """What died or was taken away since the last apply is not in the ledger: it is looked at.

    The servers of the run that are there. Raises HostError.
    """
    vms = {call.vm: Vm(name=call.vm, exported=False)}
    desired = Desired(settings=eyes.settings, vms=vms)
    seen = eyes.look(desired, ledger, ask=False, secrets=False)
    why = incomplete(desired, seen, ledger, eyes.now(), call)
    if why:
        raise HostError(f"cannot call run {call.run} of {call.vm} completed: {why}")
    keys = {export_key(export) for export in call.exports}
    return [server for server in seen.servers if server.mark.key in keys]


def _measured(
    hub: Hub, call: Call, servers: Sequence[Server]
) -> tuple[Mapping[str, Any], list[str]]:
    """What is kept of the images of a run that a person calls complete, as at any other end, and
    what to tell. Raises HostError: they are damaged, so it is no backup.

    What cannot be measured is not known: a person is believed, also where a client has not left.
    """
    try:
        seals = hub.measured(call.exports, servers)
    except HostError as error:
        why = str(error).removesuffix(f"; {NOT_ENDED}").removeprefix(f"{NOT_ENDED}: ")
        return {}, [f"what its images take is not known, nor their digests: {why}"]
    event, found = verdict(call.type, seals)
    if event is CallEvent.DAMAGED:
        raise HostError(f"cannot call run {call.run} of {call.vm} completed: {found}")
    return {"archived": archived(call, seals, hub.now())}, []


def _nobody_connected(eyes: Observer, ledger: Ledger, call: Call) -> None:
    """Another attempt while a client of this one is connected would be two writers."""
    vms = {call.vm: Vm(name=call.vm, exported=False)}
    seen = eyes.look(Desired(settings=eyes.settings, vms=vms), ledger, ask=False, secrets=False)
    for server in seen.servers:
        if server.mark.vm == call.vm and server.clients:
            raise HostError(
                f"cannot resend run {call.run} of {call.vm}: {server.clients} clients are "
                f"connected to port {server.mark.port}, so the first attempt is alive: "
                f"reconciler resolve {call.vm} --accepted --reason WHY, or cut them off: "
                f"reconciler stop {call.vm} --kill-clients --cancel-run"
            )
