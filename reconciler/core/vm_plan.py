"""The plan of one VM: what its exports, its call and its ports need, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from reconciler.core.actions import Action, Conclude, Hold, Notify, Release, Stop, Witness
from reconciler.core.actual import Actual, Server
from reconciler.core.call import Call, CallEvent, CallState, difference, job_id
from reconciler.core.desired import Desired, Export, Vm, at_attempt
from reconciler.core.disk_plan import Disks, export_key
from reconciler.core.guards import keeps, unfit
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.ports import Pool
from reconciler.core.units import Port, Seconds, format_duration

LOST: Final = "ClaimWithoutRecord"
"""Reason of a call that only a claim in the repository tells of."""
NOT_AGAIN: Final = ". It is not called again by itself"
"""Behind what is known of an unknown call, in a plan; not part of what is remembered of it."""


class VmPlan(Struct, frozen=True, kw_only=True):
    """What is to be done about one VM, in order, and where its disks are or will be."""

    name: str
    vm: Vm
    actions: tuple[Action, ...]
    call: Call | None = None
    """The ledger's call of the run, as it was when this was planned."""
    ports: Mapping[int, Port] = field(default_factory=dict)
    """Disk key → port."""

    @property
    def lost_run(self) -> str:
        """Why the run that is wanted can never be a backup; empty: it can."""
        call = self.call
        if call is None or not self.vm.exported or call.run != self.vm.run:
            return ""
        if call.tainted and call.state.active:
            return (
                f"a server of run {call.run} died under a client: acknowledged writes may be "
                "gone, and the run can only fail; when the appliance has ended, ask for a new run"
            )
        if call.state not in (CallState.FAILED, CallState.CANCELLED):
            return ""
        return f"run {call.run} is {call.state}: {call.message}; ask for a new run"


class OneVm(Disks):
    """The planning of one VM: what it was called for, what ends, what comes up, the call."""

    def remembered(self) -> Call | None:
        """The call that rules this VM now: the active one, else that of the wanted run."""
        outdated = [call for call in self.ledger.calls if self.is_outdated(call)]
        found = self.ledger.active(self.vm.name) or next(iter([*outdated, *self.lost]), None)
        if found or not self.vm.run or self.vm.purpose != "backup":
            return found
        return self.ledger.latest(self.vm.name, self.vm.run)

    def is_outdated(self, call: Call) -> bool:
        """The repository says that an SNA may have been called since this was written down."""
        return call.vm == self.vm.name and call.key in self.actual.intents

    @cached_property
    def lost(self) -> Sequence[Call]:
        """Claims without our row: somebody asked for these runs, with what outcome is unknown."""
        known = {call.key for call in self.ledger.calls}
        served = {s.mark.key[2:] for s in self.servers if "--read-only" not in s.argv}
        found = [one for one in sorted(served) if (self.vm.name, *one) not in known]
        run = self.vm.run
        if not self.ledger.latest(self.vm.name, run) and run not in {one for one, _ in served}:
            found.append((run, 1))
        return [
            self.lost_call(run, attempt, owner)
            for run, attempt in found
            if (owner := self.actual.claims.get((self.vm.name, run)))
        ]

    def lost_call(self, run: str, attempt: int, owner: str) -> Call:
        """What the ledger should say of a run that only a claim tells of."""
        whose = (
            "this state directory, whose record of it is gone"
            if owner == self.ledger.state_id
            else "another state directory"
        )
        hub, vm = self.desired.settings.hub, self.vm.name
        exports = tuple(
            at_attempt(export, attempt)
            for export in self.vm.exports
            if export.run == run and export.attempt in (1, attempt)
        )
        return Call(
            hub=hub,
            vm=vm,
            run=run,
            attempt=attempt,
            job_id=job_id(hub, vm, run, attempt),
            state=CallState.UNKNOWN,
            sna=self.vm.sna,
            type=self.vm.type,
            request="",
            exports=exports,
            # What died meanwhile was in the record that is gone: what is missing may have.
            tainted=self.more_than(exports, run) or any(map(self.may_have_died, exports)),
            created=self.now,
            changed=self.now,
            reason=LOST,
            message=f"the run was claimed by {whose}; whether the appliance was called is "
            "not known",
        )

    def more_than(self, exports: Sequence[Export], run: str) -> bool:
        """A run has, or may have had, disks that the spec does not name."""
        served = {server.mark.disk for server in self.servers if server.mark.run == run}
        return not exports or not served <= {export.key for export in exports}

    def may_have_died(self, export: Export) -> bool:
        """Somebody has written into it, and nobody serves it now."""
        image = self.actual.images.get(export.image)
        return self.server_for(export) is None and not (image and image.pristine)

    def plan(self) -> VmPlan:
        self.call = self.remembered()
        trouble = self.actual.troubles.get(self.vm.name)
        if trouble:
            self.refuse("StorageUnreadable", f"{trouble}; nothing of this VM is changed")
        elif self.vm.exported:
            self.exported()
        else:
            self.absent()
        return VmPlan(
            name=self.vm.name,
            vm=self.vm,
            actions=tuple(self.actions),
            call=self.call,
            ports=self.ports,
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
        found = next((call for call in (*self.ledger.calls, *self.lost) if call.key == key), None)
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
                    f"the run {vm.run} is {call.state} and cannot be another: {changed}; ask for "
                    "a new run, or put the spec back",
                )
        self.outcome()
        wanted = self.wanted()
        serving, keep = self.match(wanted)
        cleared = self.clear(keep)
        if self.over is not None and not wanted:
            return
        fit = self.check(wanted, serving)
        up = fit and self.serve(wanted, serving)
        if self.over is not None or not fit:
            return
        if call and call.state.active and (call.run != vm.run or not backup):
            self.wait(
                "RunActive",
                f"the run {call.run} is {call.state}; {vm.run} has its turn when that has ended",
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
                f"({self.ledger.state_id}): apply it there, or ask for a new run here",
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
        if report and ended and sna and sna.reports_end:
            self.conclude(call, report.status, report.message)
            return
        if call.state is CallState.ACCEPTED:
            return
        if call.state is CallState.INTENDED and self.ledger.busy:
            self.wait("Calling", f"it is being called now, by {self.ledger.busy}")
            return
        if report and report.known:
            why = f"SNA {call.sna} knows the job: {report.status or 'no status'}"
            self.actions.append(
                Witness(**base, cause="WitnessedByAppliance", why=why, event=CallEvent.WITNESS)
            )
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
                remember=call not in self.ledger.calls,
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
        dead = [
            export.key
            for export in call.exports
            if self.server_for(export) is None and self.would_taint(export)
        ]
        event, cause, why = CallEvent.FAIL, "RunFailed", f"SNA {call.sna}: {message or 'it failed'}"
        if status == "completed":
            event, cause, why = CallEvent.END, "RunCompleted", f"SNA {call.sna} reports its end"
            unseen = [image for e in call.exports if (image := self.unseen(e))]
            if unseen:
                why = f"{'; '.join(unseen)}: before that is known, the run is not ended"
                self.actions.append(
                    Hold(vm=self.vm.name, call=call, cause="ImageUnreadable", why=why)
                )
                return
            lost = [export.image for export in call.exports if self.image_lost(export)]
            if lost:
                event, cause = CallEvent.FAIL, "ImageLost"
                why = (
                    f"{', '.join(lost)}: moved, deleted or replaced under its server; the run is "
                    "failed although its SNA reports completed"
                )
            elif call.tainted and not call.exports:
                event, cause = CallEvent.SERVER_DIED, "RecordLost"
                why = (
                    "its record was lost, and which disks it had is not known; the run is failed "
                    "although its SNA reports completed"
                )
            elif call.tainted or dead:
                event, cause = CallEvent.SERVER_DIED, "ServerDied"
                why = (
                    "a server died under a client, so acknowledged writes may be gone; the run "
                    "is failed although its SNA reports completed"
                )
        self.actions.append(Conclude(vm=self.vm.name, call=call, event=event, cause=cause, why=why))


def incomplete(desired: Desired, actual: Actual, ledger: Ledger, now: Seconds, call: Call) -> str:
    """Why a run that is said to be complete is no backup; empty: nothing speaks against it.

    A report of the SNA and the word of a person are measured alike.
    """
    servers = [server for server in actual.servers if server.mark.vm == call.vm]
    pool = Pool(desired.settings.ports, ())
    planner = OneVm(desired, actual, ledger, now, desired.vms[call.vm], servers, pool)
    planner.call = call
    planner.conclude(call, "completed", "")
    (found,) = planner.actions
    return "" if isinstance(found, Conclude) and found.event is CallEvent.END else found.why
