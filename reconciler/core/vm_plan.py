"""The plan of one VM: what its exports, its call and its ports need, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.actions import Action, Conclude, Hold, Notify, Release, Stop, Wait, Witness
from reconciler.core.actual import Actual, Server
from reconciler.core.appliances import UNREACHABLE, refusal, unbegun
from reconciler.core.call import Call, CallEvent, CallState, difference, ending
from reconciler.core.call_plan import LOST, Calls
from reconciler.core.desired import Desired, Export, Vm
from reconciler.core.disk_plan import export_key
from reconciler.core.guards import keeps
from reconciler.core.ledger import EVERY, Lease, Ledger, Pause
from reconciler.core.ports import Pool
from reconciler.core.space import Room
from reconciler.core.units import Port, Seconds, format_duration, stamp


def new_run(vm: str) -> str:
    """The command that asks for another run of a VM."""
    return f"reconciler backup {vm} --run NEW"


class VmPlan(Struct, frozen=True, kw_only=True):
    """What is to be done about one VM, in order, and where its disks are or will be."""

    name: str
    vm: Vm
    actions: tuple[Action, ...]
    call: Call | None = None
    """The ledger's call of the run, as it was when this was planned."""
    ports: Mapping[int, Port] = field(default_factory=dict)
    """Disk key → port."""
    unsure: str = ""
    """What could still fill up the file systems of its run; empty: nothing."""
    ahead: str = ""
    """What its spec says otherwise than its run was, which has ended; empty: nothing."""
    stale: str = ""
    """For how long nothing was heard of its run, or by what it seems to be given up, and what can
    be seen of it; empty: nothing speaks for that."""
    stale_cause: str = ""
    """The reason of that."""
    asks: bool = False
    """Its run is accepted, and its SNA is worth a question all the same."""
    unheard: str = ""
    """Why what the client of its run reports is lost; empty: it is taken."""

    @property
    def again_at(self) -> Seconds:
        """When the first wait ends by the clock alone; 0: none does."""
        ends = [a.until for a in self.actions if isinstance(a, Wait | Hold) and a.until]
        return min(ends, default=0.0)

    @property
    def waits(self) -> list[Wait]:
        """Waits without whose end it is not as declared. A run whose disks are all reported
        complete ends by itself when its clients have left: until then all is as it was asked for.
        """
        waits = (action for action in self.actions if isinstance(action, Wait))
        return [wait for wait in waits if wait.cause != "ClientsConnected"]

    @property
    def tainted_run(self) -> str:
        """What died under the run that is active, whichever is wanted by now; empty: nothing."""
        call = self.call
        if call is None or not call.tainted or not call.state.active:
            return ""
        return (
            f"a server of run {call.run} died under a client: acknowledged writes may be gone, and "
            f"the run can only fail; when the appliance has ended: {ending(call)}"
        )

    @property
    def lost_run(self) -> str:
        """Why the run that is wanted can never be a backup; empty: it can."""
        call = self.call
        if call is None or not self.vm.exported or call.run != self.vm.run:
            return ""
        if call.tainted and call.state.active:
            return f"{self.tainted_run}, then ask for a new run: {new_run(self.name)}"
        if call.state not in (CallState.FAILED, CallState.CANCELLED):
            return ""
        said = f": {call.message}" if call.message else ""
        return f"run {call.run} is {call.state}{said}; ask for a new run: {new_run(self.name)}"


class OneVm(Calls):
    """The planning of one VM: what it was called for, what ends, what comes up, the call."""

    def plan(self) -> VmPlan:
        hangs = self.actual.hangs.get(self.vm.name)
        trouble = self.actual.troubles.get(self.vm.name)
        pause = None if self.desired.ordered else self.ledger.paused(self.vm.name, self.now)
        if hangs:
            self.refuse(
                "StorageHangs",
                f"{hangs}: see dmesg, and bring that storage back; nothing of this VM is changed",
            )
        elif trouble:
            self.refuse("StorageUnreadable", f"{trouble}; nothing of this VM is changed")
        elif rival := self.rival():
            self.refuse("ClaimedElsewhere", rival)
        elif self.twin:
            self.refuse("Renamed", self.twin)
        elif pause:  # after what says that it is not ours to take note of anything either
            self.paused(pause)
        elif self.vm.exported:
            self.exported()
        else:
            self.absent()
        self.suffers()
        cause, stale = self.silence() if self.over is None else ("", "")
        return VmPlan(
            name=self.vm.name,
            vm=self.vm,
            actions=tuple(self.actions),
            call=self.call,
            ports=self.ports,
            ahead=self.ahead,
            stale=stale,
            stale_cause=cause,
            asks=self.over is None and self.worth_asking(),
            unheard=self.unheard() if self.over is None else "",
        )

    def rival(self) -> str:
        """Why nothing of this VM is ours to change: another state directory has it. Empty: it is.

        Its servers carry our hub's name, so the mark alone cannot tell; the claim can.
        """
        runs = {server.mark.run for server in self.servers} | {self.vm.run}
        for (vm, run), directory in sorted(self.actual.rivals.items()):
            if vm == self.vm.name and run in runs:
                return (
                    f"its run {run} is claimed by the state directory {directory}, which exists: "
                    f"this hub has two. Work there (RECONCILER_STATE={directory}), or remove the "
                    "one that is not in use; nothing of this VM is changed here"
                )
        return ""

    def suffers(self) -> None:
        """An active run that cannot be written any further is said; nothing is stopped for it."""
        if self.call is None or not self.call.state.active or self.over is not None:
            return
        found = self.room.suffering(self.vm.name, self.call.run)
        if found:
            cause, why = found
            subject = "its servers are left as they are"
            self.actions.append(Hold(vm=self.vm.name, cause=cause, why=why, subject=subject))

    # -- what is left alone

    def paused(self, pause: Pause) -> None:
        """Nothing is changed; what became of the call is noted all the same, as it may be forgotten
        by who knows it, and changes nothing of the VM."""
        self.outcome()
        ends = any(isinstance(action, Conclude) for action in self.actions)
        self.actions = [action for action in self.actions if notes(action)]
        self.ports = {server.mark.disk: server.mark.port for server in self.servers}
        every = pause.vm == EVERY
        until = f", until {stamp(pause.until)}" if pause.until else ""
        end = "; its run is to end: that waits too" if ends else ""
        self.actions.append(
            Hold(
                vm=self.vm.name,
                cause="Paused",
                why=f"{'every VM was' if every else 'it was'} paused at {stamp(pause.since)}"
                f"{until}, by {pause.who or 'somebody'}: {pause.reason}{end}; to go on: "
                f"reconciler resume {'--all' if every else self.vm.name}",
                until=pause.until,
            )
        )

    # -- what is to be gone

    def absent(self) -> None:
        self.outcome()
        self.clear(())
        call = self.call
        if call and call.state.active and not self.actions:
            self.actions.append(
                Hold(
                    vm=self.vm.name,
                    cause="RunActive",
                    why=f"its run {call.run} is {call.state}; when the appliance is not writing: "
                    f"{ending(call)}",
                    subject="its ports stay leased",
                )
            )

    def clear(self, keep: Sequence[Server]) -> bool:
        """Stop every server but those, release their ports; False if one is held."""
        free = True
        kept = {server.identity for server in keep}
        for server in sorted(self.servers, key=lambda s: (s.mark.key, s.pid)):
            if server.identity in kept:
                continue
            held = keeps(
                server,
                self.ruling(server),
                protect=self.vm.protect,
                kill_clients=self.desired.kill_clients,
                drained=self.desired.drained,
                declared=self.declared,
            )
            base: dict[str, Any] = {"vm": self.vm.name, "disk": server.mark.disk}
            if held:
                free = False
                subject = f"keep pid {server.pid} on {server.mark.port}"
                self.actions.append(Hold(**base, cause=held[0], why=held[1], subject=subject))
                continue
            lease = self.leases.get(server.mark.key)
            if lease and lease.port != server.mark.port:
                lease = None  # a second server for the same disk: the lease is the other's
            cause, why = self.unwanted(server)
            self.actions.append(Stop(**base, cause=cause, why=why, server=server, lease=lease))
        held_keys = {server.mark.key for server in self.servers}
        wanted = {export_key(export) for export in self.wanted()}
        for key in sorted(self.leases.keys() - held_keys - wanted):
            lease = self.leases[key]
            if self.protected(lease):
                continue
            why = "no server holds it and nothing wants it"
            self.actions.append(
                Release(vm=self.vm.name, disk=lease.disk, cause="LeaseUnused", why=why, lease=lease)
            )
        return free

    def ruling(self, server: Server) -> Call | None:
        """The call that a server is up for, unless it ends in this plan."""
        key = (self.vm.name, *server.mark.key[2:])
        if self.call and self.call.key == key:
            return self.call if self.over is None else None
        found = self.ledger.find(*key) or next((c for c in self.lost if c.key == key), None)
        if found and self.is_outdated(found):
            return replace(found, state=CallState.UNKNOWN)
        return found

    def protected(self, lease: Lease) -> bool:
        """The port of an active run stays its own, server or not: the SNA was told it."""
        call = self.call
        return bool(
            call
            and self.over is None
            and call.state.active
            and (call.run, call.attempt) == (lease.run, lease.attempt)
        )

    def unwanted(self, server: Server) -> tuple[str, str]:
        if not self.vm.exported:
            return "Absent", self.vm.order or "the spec says `state: absent`"
        if self.over:
            return "RunEnded", f"its run {self.over.run} is {self.over.state}"
        if server.mark.run != self.vm.run:
            return "RunOver", f"it serves the run {server.mark.run}, wanted is {self.vm.run}"
        if server.mark.attempt != max((e.attempt for e in self.vm.exports), default=1):
            return "AttemptOver", f"it serves attempt {server.mark.attempt}"
        if server.mark.disk not in {export.key for export in self.vm.exports}:
            return "DiskNotDeclared", "the spec has no such disk"
        return "Double", "another server of ours serves this disk"

    # -- what is to be there

    @property
    def over(self) -> Call | None:
        """The run's call, if the run has ended or ends in this plan."""
        if self.call is None:
            return None
        for action in self.actions:
            if isinstance(action, Conclude):
                return replace(
                    self.call,
                    state=CallState.COMPLETED
                    if action.event is CallEvent.END
                    else CallState.FAILED,
                )
        return self.call if self.call.state.terminal else None

    def wanted(self) -> Sequence[Export]:
        """The exports that should be up: those of the active run before those of the spec."""
        if not self.vm.exported:
            return ()
        over, call = self.over, self.call
        if over is not None:
            return (over.exports or self.vm.exports) if self.vm.release == "keep" else ()
        if call and call.reason == LOST:  # keep up what is there; nothing is known of the rest
            return tuple(
                export
                for export in call.exports or self.vm.exports
                if self.server_for(export) or export_key(export) in self.leases
            )
        return call.exports if call and call.state.active else self.vm.exports

    def exported(self) -> None:
        self.judge_parents()
        vm, call = self.vm, self.call
        backup = vm.purpose == "backup"
        if backup and call and call.run == vm.run and call.state.terminal and call.exports:
            vm = self.as_it_ended(call)
        if backup and self.desired.stale and not self.begun:
            self.outcome()
            self.ports = {server.mark.disk: server.mark.port for server in self.servers}
            self.refuse(
                "InventoryStale",
                f"no run begins, as a disk may have been added since: {self.desired.stale}; when "
                "that is mended: reconciler apply; nothing of this VM is changed until then",
            )
            return
        outdated = self.desired.outdated.get(vm.name)
        if backup and outdated and not self.begun:
            self.outcome()
            self.ports = {server.mark.disk: server.mark.port for server in self.servers}
            self.refuse("InventoryMismatch", f"no run begins: {outdated}")
            return
        if backup and call and call.run == vm.run and call.state is not CallState.DUE:
            changed = difference(call, vm.sna, vm.type, vm.exports)
            if changed and call.exports and call.state is not CallState.REJECTED:
                self.refuse(
                    "RunChanged",
                    f"the run {vm.run} is {call.state} and cannot be another: {changed}; put that "
                    f"back, or ask for a new run: {new_run(vm.name)}",
                )
        self.outcome()
        wanted = self.wanted()
        serving, keep = self.match(wanted)
        cleared = self.clear(keep)
        if self.over is not None and not wanted:
            return
        fit = self.check(wanted, serving)
        have = [export_key(export) in self.leases for export in wanted]
        if not fit and any(have) and not all(have):
            self.give_back(wanted, serving, "LeaseUnused")
        if fit and self.unreachable():
            return
        fit = fit and self.fits(wanted, serving)
        up = fit and self.serve(wanted, serving)
        if len(self.ports) < len(wanted):
            self.room.give_back(vm.name)  # it waits for ports, and for their sake alone
        if self.over is not None or not fit:
            return
        if call and call.state.active and (call.run != vm.run or not backup):
            self.wait(
                "RunActive",
                f"the run {call.run} is {call.state}; {vm.run} has its turn when that has ended"
                + self.waiting_since(),
            )
        elif backup and self.calling(up and cleared):
            why = "run not yet requested"
            if call and call.failures:
                times = f"{call.failures} times" if call.failures > 1 else "once"
                why = f"tried {times}, last: {call.message}"
            cause = "RunDue"
            if vm.fell_back:
                cause, why = "FellBack", f"full instead of incremental: {vm.fell_back}"
            if call and call.state is CallState.REJECTED:
                cause, why = "RunRearmed", "the spec or the config was changed since it was refused"
            self.actions.append(Notify(vm=vm.name, cause=cause, why=why, target=vm))

    def as_it_ended(self, call: Call) -> Vm:
        """The VM with its run as that was: over, so what has changed since is about the next."""
        vm = self.vm
        changed = difference(call, vm.sna, vm.type, vm.exports)
        if changed:
            self.ahead = (
                f"the run {call.run} is {call.state} and stays as it is: {changed}; that counts "
                f"from the next run on: {new_run(vm.name)}"
            )
            self.vm = replace(vm, sna=call.sna, type=call.type, exports=call.exports)
        return self.vm

    def unreachable(self) -> bool:
        """Whether nothing of the run is begun because its SNA cannot be reached. One of which
        anything was begun goes on: its servers stay up, and the call has a preflight of its own."""
        vm, sna = self.vm, self.desired.settings.snas.get(self.vm.sna)
        served = {(server.mark.vm, server.mark.run) for server in self.servers}
        if self.begun or sna is None or not unbegun(vm, self.ledger, self.actual.claims, served):
            return False
        why = refusal(vm, sna.url, self.actual.appliances, self.ledger)
        if why and not self.secret_missing():  # that will not mend itself: it is told first
            self.wait(UNREACHABLE, why)
        return bool(why)

    def secret_missing(self) -> bool:
        """Whether a secret of the call cannot be read; says so."""
        for name in (f"vcenter {self.vm.vcenter}", f"sna {self.vm.sna}"):
            if name in self.actual.secrets:
                self.refuse("SecretUnreadable", f"{name}: {self.actual.secrets[name]}")
                return True
        return False

    def waiting_since(self) -> str:
        """Since when, once it was applied. A moment: a span would be another sentence each pass."""
        applied = self.ledger.applied.get(self.vm.name)
        if applied is None or applied.vm.get("run") != self.vm.run:
            return ""
        return f", and has waited since {stamp(applied.at)}"

    def calling(self, up: bool) -> bool:
        """Whether this plan ends in the call; says so where it does not."""
        vm, call = self.vm, self.call
        if call and call.state is CallState.REJECTED:
            same = difference(call, vm.sna, vm.type, vm.exports) is None
            if same and call.request == vm.request:
                self.refuse(
                    "CallRejected",
                    f"SNA {call.sna}: {call.message}; when that is mended: "
                    f"reconciler retry {vm.name}",
                )
                return False
        elif call and call.state is not CallState.DUE:
            return False
        if not up:
            return False
        owner = self.actual.claims.get((vm.name, vm.run))
        if owner and owner != self.ledger.state_id:
            self.refuse(
                "ClaimedElsewhere",
                f"the run {vm.run} is claimed by the state directory {owner}, not by this one "
                f"({self.ledger.state_id}): apply it there, or ask for a new run here: "
                f"{new_run(vm.name)}",
            )
            return False
        if self.secret_missing():
            return False
        if call and call.retry_at > self.now:
            left = format_duration(call.retry_at - self.now)
            self.wait("BackOff", f"{call.message}; next try in {left}", until=call.retry_at)
            return False
        return True


def notes(action: Action) -> bool:
    """Whether a step only writes down what somebody said of a call."""
    if isinstance(action, Witness):
        return action.event is CallEvent.WITNESS
    return isinstance(action, Hold)


def incomplete(desired: Desired, actual: Actual, ledger: Ledger, now: Seconds, call: Call) -> str:
    """Why a run that is said to be complete is no backup; empty: nothing speaks against it.

    A report of the SNA and the word of a person are measured alike.
    """
    servers = [server for server in actual.servers if server.mark.vm == call.vm]
    pool = Pool(desired.settings.ports, ())
    room = Room(desired.settings, actual, ledger, ())
    planner = OneVm(desired, actual, ledger, now, desired.vms[call.vm], servers, pool, room)
    planner.call = call
    planner.conclude(call, "completed", "a person says so")
    (found,) = planner.actions
    good = isinstance(found, Wait) or (isinstance(found, Conclude) and found.event is CallEvent.END)
    return "" if good else found.why
