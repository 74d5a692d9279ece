"""The plan of one VM: what its exports, its call and its ports need, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.actions import Action, Conclude, Hold, Notify, Release, Stop, Wait, Witness
from reconciler.core.actual import Actual, Server
from reconciler.core.call import Call, CallEvent, CallState, Report, difference, job_id
from reconciler.core.desired import Desired, Export, Vm, at_attempt
from reconciler.core.disk_plan import Disks, export_key
from reconciler.core.guards import in_use, keeps, unfit
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import export_of
from reconciler.core.ports import Pool
from reconciler.core.space import Room
from reconciler.core.units import Bytes, Port, Seconds, format_duration, format_size, stamp

LOST: Final = "ClaimWithoutRecord"
"""Reason of a call that only a claim in the repository tells of."""
LOOKS_APART: Final[Seconds] = 2.0
"""Between two looks in which clients on every disk count as a witness: a scanner does not stay."""
NOT_AGAIN: Final = ". It is not called again by itself"
"""Behind what is known of an unknown call, in a plan; not part of what is remembered of it."""


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

    @property
    def lost_run(self) -> str:
        """Why the run that is wanted can never be a backup; empty: it can."""
        call = self.call
        if call is None or not self.vm.exported or call.run != self.vm.run:
            return ""
        if call.tainted and call.state.active:
            return (
                f"a server of run {call.run} died under a client: acknowledged writes may be "
                "gone, and the run can only fail; when the appliance has ended, ask for a new "
                f"run: {new_run(self.name)}"
            )
        if call.state not in (CallState.FAILED, CallState.CANCELLED):
            return ""
        said = f": {call.message}" if call.message else ""
        return f"run {call.run} is {call.state}{said}; ask for a new run: {new_run(self.name)}"


class OneVm(Disks):
    """The planning of one VM: what it was called for, what ends, what comes up, the call."""

    def remembered(self) -> Call | None:
        """The call that rules this VM now: the active one, else that of the wanted run."""
        outdated = [call for call in self.ledger.open if self.is_outdated(call)]
        found = self.ledger.active(self.vm.name) or next(iter([*outdated, *self.lost]), None)
        if found or not self.vm.run or self.vm.purpose != "backup":
            return found
        return self.ledger.latest(self.vm.name, self.vm.run)

    def is_outdated(self, call: Call) -> bool:
        """The repository says that an SNA may have been called since this was written down."""
        return call.vm == self.vm.name and call.key in self.actual.intents

    @cached_property
    def lost(self) -> Sequence[Call]:
        """Runs of which a claim or a server tells and the ledger does not: what became of their
        calls is unknown."""
        name, run = self.vm.name, self.vm.run
        served: dict[tuple[str, int], list[Server]] = {}
        for server in self.servers:
            if "--read-only" not in server.argv:
                served.setdefault((server.mark.run, server.mark.attempt), []).append(server)
        found = {key: served[key] for key in sorted(served) if not self.ledger.find(name, *key)}
        asked = self.vm.purpose == "backup" and (name, run) in self.actual.claims
        if asked and run not in {one for one, _ in served} and not self.ledger.latest(name, run):
            found[run, 1] = []
        return [self.unrecorded(*key, servers) for key, servers in found.items()]

    def unrecorded(self, run: str, attempt: int, served: Sequence[Server]) -> Call:
        """The call of a lost run, as far as what can be seen tells of it."""
        hub, vm = self.desired.settings.hub, self.vm
        owner = self.actual.claims.get((vm.name, run))
        if owner == self.ledger.state_id:
            told = "the run was claimed by this state directory, whose record of it is gone"
        elif owner:
            told = "the run was claimed by another state directory, which is gone"
        else:
            told = "its servers run, and neither the ledger nor the repository tells of it"
        exports = tuple(
            at_attempt(export, attempt)
            for export in vm.exports
            if export.run == run and export.attempt in (1, attempt)
        )
        # What died meanwhile was in the record that is gone: what is missing may have.
        keys = {export.key for export in exports}
        tainted = (
            not exports
            or not {server.mark.disk for server in served} <= keys
            or any(map(self.may_have_died, exports))
        )
        if not exports:  # the spec is about another run: what is served is all that is known
            seen = [
                export_of(one.argv, one.mark, one.handshake.size if one.handshake else None)
                for one in served
            ]
            exports = tuple(sorted(seen, key=lambda export: export.position))
        return Call(
            hub=hub,
            vm=vm.name,
            run=run,
            attempt=attempt,
            job_id=job_id(hub, vm.name, run, attempt),
            state=CallState.UNKNOWN,
            sna=vm.sna,
            type=vm.type,
            request="",
            exports=exports,
            tainted=tainted,
            created=self.now,
            changed=self.now,
            reason=LOST,
            message=f"{told}; whether the appliance was called is not known",
            display_name=vm.display_name,
            path=vm.path,
            vcenter=vm.vcenter,
        )

    def may_have_died(self, export: Export) -> bool:
        """Somebody has written into it, and nobody serves it now."""
        image = self.actual.images.get(export.image)
        return self.server_for(export) is None and not (image and image.pristine)

    def plan(self) -> VmPlan:
        hangs = self.actual.hangs.get(self.vm.name)
        trouble = self.actual.troubles.get(self.vm.name)
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
        elif self.vm.exported:
            self.exported()
        else:
            self.absent()
        self.suffers()
        return VmPlan(
            name=self.vm.name,
            vm=self.vm,
            actions=tuple(self.actions),
            call=self.call,
            ports=self.ports,
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
                    f"reconciler resolve {self.vm.name} --completed | --failed --reason WHY",
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
        vm, call = self.vm, self.call
        backup = vm.purpose == "backup"
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
        fit = self.check(wanted, serving) and self.fits(wanted, serving)
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
            if call and call.state is CallState.REJECTED:
                cause, why = "RunRearmed", "the spec or the config was changed since it was refused"
            self.actions.append(Notify(vm=vm.name, cause=cause, why=why, target=vm))

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
        secrets = [f"vcenter {vm.vcenter}", f"sna {vm.sna}"]
        for name in secrets:
            if name in self.actual.secrets:
                self.refuse("SecretUnreadable", f"{name}: {self.actual.secrets[name]}")
                return False
        if call and call.retry_at > self.now:
            left = format_duration(call.retry_at - self.now)
            self.wait("BackOff", f"{call.message}; next try in {left}")
            return False
        return True

    def outcome(self) -> None:
        """What is known of a call that was made, from its SNA or from the crash that hid it."""
        call = self.call
        for other in self.lost:
            if call is None or other.key != call.key:
                self.unknown(other, other.message, None)
        if call is not None and self.is_outdated(call):
            self.unknown(
                call,
                f"its record says {call.state}, its repository that the appliance may have been "
                "called since: the record is older",
                CallEvent.EVIDENCE,
            )
            self.call = replace(call, state=CallState.UNKNOWN, reason=CallEvent.EVIDENCE)
            return
        if call is None or not call.state.active:
            return
        base: dict[str, Any] = {"vm": self.vm.name, "call": call}
        report = self.actual.reports.get(call.job_id)
        sna = self.desired.settings.snas.get(call.sna)
        ended = report and report.known and report.status in ("completed", "failed")
        if call.state is CallState.INTENDED and self.ledger.busy:
            self.wait("Calling", f"it is being called now, by {self.ledger.busy}")
            return
        if report and ended and sna and sna.reports_end:
            said = "its status says that it has ended" if report.status == "completed" else ""
            self.conclude(call, report.status, report.message or said or "it failed")
            return
        if self.all_reported(call):
            self.conclude(call, "completed", "its client reported every disk complete")
            return
        if call.state is CallState.ACCEPTED:
            return
        witness = self.witness(call, report)
        if witness:
            cause, why = witness
            self.actions.append(Witness(**base, cause=cause, why=why, event=CallEvent.WITNESS))
            return
        # Where the record was lost, the SNA that was called may be another than the spec's.
        lost = call.reason == LOST
        if report and report.known is False and sna and sna.remembers_jobs and not lost:
            why = f"SNA {call.sna} remembers its jobs and does not know this one: it may be asked"
            self.actions.append(
                Witness(**base, cause="DeniedByAppliance", why=why, event=CallEvent.DENY)
            )
            return
        said = call.message or "we ended between the intent and the answer"
        if report and report.message:
            said += f" (its status says: {report.message})"
        crash = CallEvent.CRASH if call.state is CallState.INTENDED else None
        self.unknown(call, said, crash)

    def all_reported(self, call: Call) -> bool:
        """Every disk of the run has arrived, by the word of the SNA's client."""
        reported = self.ledger.reports.get(call.job_id, {})
        return bool(call.exports) and all(e.position in reported for e in call.exports)

    def witness(self, call: Call, report: Report | None) -> tuple[str, str] | None:
        """(cause, why) for which the SNA acts on a call whose outcome is unknown."""
        if report and report.known:
            return (
                "WitnessedByAppliance",
                f"SNA {call.sna} knows the job: {report.status or 'no status'}",
            )
        if call.job_id in self.ledger.reports or call.job_id in self.ledger.telemetry:
            return "WitnessedByClient", f"the client of SNA {call.sna} has reported about the job"
        before, now = self.ledger.sightings.get(call.job_id), sighted(call, self.actual)
        if (
            before
            and now is not None
            and self.now - before.at >= LOOKS_APART
            and now > before.allocated
        ):
            grown = format_size(now - before.allocated)
            for_long = format_duration(self.now - before.at)
            why = f"every disk has had clients for {for_long}, and the images have grown by {grown}"
            return "WitnessedByWriters", why
        return None

    def unknown(self, call: Call, said: str, event: CallEvent | None) -> None:
        """Hold, say what is not known, and wait for a person."""
        self.actions.append(
            Hold(
                vm=self.vm.name,
                call=call,
                cause="CallUnknown",
                why=f"{said}{NOT_AGAIN}; when you know: "
                f"reconciler resolve {self.vm.name} --accepted | --completed | --failed | --resend",
                subject="the outcome of the call is unknown",
                event=event,
                remember=call not in self.ledger.open,
            )
        )

    def unseen(self, export: Export) -> str:
        """Why an image cannot be looked at just now; empty: it can."""
        image = self.actual.images.get(export.image)
        return f"cannot look at {image.path}: {image.error}" if image and image.error else ""

    def image_lost(self, export: Export) -> bool:
        """What was written is not what is at the image's path."""
        server, image = self.server_for(export), self.actual.images.get(export.image)
        if server and not server.holds_image:
            return True
        return image is None or bool(unfit(export, image, held=True)) or not image.exists

    def conclude(self, call: Call, status: str, message: str) -> None:
        if status != "completed":
            self.end(call, CallEvent.FAIL, "RunFailed", f"SNA {call.sna}: {message}")
            return
        unseen = [image for e in call.exports if (image := self.unseen(e))]
        if unseen:
            why = f"{'; '.join(unseen)}: before that is known, the run is not ended"
            self.actions.append(Hold(vm=self.vm.name, call=call, cause="ImageUnreadable", why=why))
            return
        dead = [
            export
            for export in call.exports
            if self.server_for(export) is None and self.would_taint(export)
        ]
        lost = [export.image for export in call.exports if self.image_lost(export)]
        if lost:
            self.end(
                call,
                CallEvent.FAIL,
                "ImageLost",
                f"{', '.join(lost)}: moved, deleted or replaced under its server; the run is "
                f"failed although SNA {call.sna} reports completed",
            )
        elif call.tainted and not call.exports:
            self.end(
                call,
                CallEvent.SERVER_DIED,
                "RecordLost",
                "its record was lost, and which disks it had is not known; the run is failed "
                f"although SNA {call.sna} reports completed",
            )
        elif call.tainted or dead:
            self.end(
                call,
                CallEvent.SERVER_DIED,
                "ServerDied",
                "a server died under a client, so acknowledged writes may be gone; the run "
                f"is failed although SNA {call.sna} reports completed",
            )
        else:
            self.publish(call, message)

    def publish(self, call: Call, message: str) -> None:
        """The run is complete; it counts when its images are flushed, checked and left alone."""
        servers = {export.key: self.server_for(export) for export in call.exports}
        busy = [f"{in_use(one)}" for one in servers.values() if one and one.clients]
        silent = [
            f"disk {key}"
            for key, one in servers.items()
            if not (one and one.handshake and one.handshake.answered)
        ]
        if busy:
            self.wait(
                "ClientsConnected",
                f"{message}, but {'; '.join(busy)}: it counts when they have left",
            )
        elif silent:
            self.wait(
                "ServersNotReady",
                f"{message}; what was written is to be flushed and checked first, and "
                f"{', '.join(silent)} cannot be asked for it now",
            )
        else:
            up = tuple(server for server in servers.values() if server)
            self.end(call, CallEvent.END, "RunCompleted", f"SNA {call.sna}: {message}", up)

    def end(
        self, call: Call, event: CallEvent, cause: str, why: str, up: tuple[Server, ...] = ()
    ) -> None:
        self.actions.append(
            Conclude(vm=self.vm.name, call=call, event=event, cause=cause, why=why, servers=up)
        )


def sighted(call: Call, actual: Actual) -> Bytes | None:
    """What the images of a run take, if every disk has a client; None: not every one has."""
    servers = {server.mark.key: server for server in actual.servers}
    total = 0
    for export in call.exports:
        server = servers.get(export_key(export))
        image = actual.images.get(export.image)
        if not server or not server.clients or image is None:
            return None
        total += image.allocated
    return total if call.exports else None


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
