"""The plan of one VM: what its exports, its call and its ports need, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from reconciler.core.actions import (
    Action,
    Adopt,
    Conclude,
    Create,
    Hold,
    Notify,
    Refuse,
    Release,
    Restart,
    Start,
    Stop,
    Wait,
    Witness,
)
from reconciler.core.actual import Actual, Image, Server
from reconciler.core.call import Call, CallEvent, CallState, difference, request_digest
from reconciler.core.desired import Desired, Export, Vm
from reconciler.core.guards import in_use, keeps, unfit, unfit_parent
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import argv
from reconciler.core.ports import Pool
from reconciler.core.units import Port, Seconds, format_duration, format_size

LOST: Final = "ClaimWithoutRecord"
"""Reason of a call that only a claim in the repository tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPlan:
    """What is to be done about one VM, in order, and where its disks are or will be."""

    name: str
    vm: Vm
    actions: tuple[Action, ...]
    call: Call | None = None
    """The ledger's call of the run, as it was when this was planned."""
    ports: Mapping[int, Port] = field(default_factory=dict)
    """Disk key → port."""


class OneVm:
    """The planning of one VM."""

    def __init__(
        self,
        desired: Desired,
        actual: Actual,
        ledger: Ledger,
        now: Seconds,
        vm: Vm,
        servers: list[Server],
        pool: Pool,
    ) -> None:
        self.desired, self.actual, self.ledger, self.now = desired, actual, ledger, now
        self.vm, self.servers, self.pool = vm, servers, pool
        self.leases = {lease.key: lease for lease in ledger.of(vm.name)}
        self.actions: list[Action] = []
        self.ports: dict[int, Port] = {}
        self.call = self.remembered()

    def remembered(self) -> Call | None:
        """The call that rules this VM now: the active one, else that of the wanted run."""
        active = self.ledger.active(self.vm.name)
        if active or not self.vm.run or self.vm.purpose != "backup":
            return active or self.lost()
        return self.ledger.latest(self.vm.name, self.vm.run) or self.lost()

    def lost(self) -> Call | None:
        """A claim without our row: somebody asked for this run, with what outcome is unknown."""
        runs = {server.mark.run for server in self.servers} | {self.vm.run}
        for (vm, run), owner in sorted(self.actual.claims.items()):
            if vm != self.vm.name or run not in runs or self.ledger.latest(vm, run):
                continue
            whose = (
                "this state directory, whose record of it is gone"
                if owner == self.ledger.state_id
                else "another state directory"
            )
            return Call(
                hub=self.desired.settings.hub,
                vm=vm,
                run=run,
                attempt=max([s.mark.attempt for s in self.servers if s.mark.run == run] or [1]),
                state=CallState.UNKNOWN,
                sna=self.vm.sna,
                type=self.vm.type,
                request="",
                exports=self.vm.exports if self.vm.run == run else (),
                created=self.now,
                changed=self.now,
                reason=LOST,
                message=f"the run was claimed by {whose}; whether the appliance was called is "
                "not known",
            )
        return None

    def plan(self) -> VmPlan:
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
                self.call if self.over is None else None,
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
            return "Absent", "the spec says `state: absent`"
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
                return dataclasses.replace(
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
                for export in self.vm.exports
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
        if not backup or self.over is not None or not fit:
            return
        if call and call.state.active and call.run != vm.run:
            self.wait(
                "RunActive",
                f"the run {call.run} is {call.state}; {vm.run} is asked for when it has ended",
            )
        elif self.calling(up and cleared):
            why = "run not yet requested"
            if call and call.failures:
                why = f"tried {call.failures} times, last: {call.message}"
            cause = "RunDue"
            if call and call.state is CallState.REJECTED:
                cause, why = "RunRearmed", "the spec or the config was changed since it was refused"
            self.actions.append(Notify(vm=vm.name, cause=cause, why=why, target=vm))

    def calling(self, up: bool) -> bool:
        """Whether this plan ends in the call; says so where it does not."""
        vm, call = self.vm, self.call
        if call and call.state is CallState.REJECTED:
            same = difference(call, vm.sna, vm.type, vm.exports) is None
            if same and call.request == request_digest(vm, self.desired.settings):
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
        if report and report.known:
            why = f"SNA {call.sna} knows the job: {report.status or 'no status'}"
            self.actions.append(
                Witness(**base, cause="WitnessedByAppliance", why=why, event=CallEvent.WITNESS)
            )
            return
        if report and report.known is False and sna and sna.remembers_jobs:
            why = f"SNA {call.sna} remembers its jobs and does not know this one: it may be asked"
            self.actions.append(
                Witness(**base, cause="DeniedByAppliance", why=why, event=CallEvent.DENY)
            )
            return
        asked = ""
        if report:
            asked = f" (its status says: {report.message})" if report.message else ""
        said = call.message or "we ended between the intent and the answer"
        self.actions.append(
            Hold(
                **base,
                cause="CallUnknown",
                why=f"{said}{asked}. It is not called again by itself; when you know: "
                f"reconciler resolve {self.vm.name} --accepted | --completed | --failed | --resend",
                subject="the outcome of the call is unknown",
                event=CallEvent.CRASH if call.state is CallState.INTENDED else None,
                remember=call.reason == LOST,
            )
        )

    def conclude(self, call: Call, status: str, message: str) -> None:
        dead = [
            export.key
            for export in call.exports
            if self.server_for(export) is None and self.would_taint(export)
        ]
        event, cause, why = CallEvent.FAIL, "RunFailed", f"SNA {call.sna}: {message or 'it failed'}"
        if status == "completed":
            event, cause, why = CallEvent.END, "RunCompleted", f"SNA {call.sna} reports its end"
            if call.tainted or dead:
                event, cause = CallEvent.SERVER_DIED, "ServerDied"
                why = (
                    "a server died under a client, so acknowledged writes may be gone; the run "
                    "is failed although its SNA reports completed"
                )
        self.actions.append(Conclude(vm=self.vm.name, call=call, event=event, cause=cause, why=why))

    def server_for(self, export: Export) -> Server | None:
        key = export_key(export)
        found = [server for server in self.servers if server.mark.key == key]
        lease = self.leases.get(key)
        if lease:
            found.sort(key=lambda server: server.mark.port != lease.port)
        return found[0] if found else None

    def match(self, wanted: Sequence[Export]) -> tuple[Mapping[int, Server], Sequence[Server]]:
        """The server of each wanted export, by disk key."""
        found = {export.key: self.server_for(export) for export in wanted}
        serving = {key: server for key, server in found.items() if server}
        return serving, list(serving.values())

    def check(self, wanted: Sequence[Export], serving: Mapping[int, Server]) -> bool:
        """Whether every image can be served; all or none."""
        fit = True
        for export in wanted:
            if export.key in serving:
                continue
            image = self.actual.images.get(export.image) or Image(path=export.image, exists=False)
            wrong = unfit(export, image, held=self.holds(export))
            if not image.exists and not wrong and self.call and self.call.state.active:
                wrong = "ImageMissing", f"{export.image} of the active run is gone"
            if not wrong and not export.read_only:
                wrong = self.shared(export)
            if not wrong and export.backing and not image.exists:
                parent = self.actual.images.get(export.backing)
                parent = parent or Image(path=export.backing, exists=False)
                wrong = unfit_parent(
                    export, parent, written=self.writer(export.backing) is not None
                )
            if wrong:
                fit = False
                self.refuse(*wrong, disk=export.key)
        return fit

    def holds(self, export: Export) -> bool:
        """The ledger knows this image as this run's."""
        call = self.call
        return call is not None and any(
            (one.image, one.run) == (export.image, export.run) for one in call.exports
        )

    def writer(self, image: str) -> str | None:
        """The other VM or run whose server writes an image."""
        for server in self.actual.servers:
            if server.argv[-1] == image and "--read-only" not in server.argv:
                return f"pid {server.pid}, VM {server.mark.vm}"
        return None

    def shared(self, export: Export) -> tuple[str, str] | None:
        """An image that another VM of this hub serves, or that another VM's active run writes."""
        for server in self.actual.servers:
            if server.argv[-1] == export.image and server.mark.key != export_key(export):
                return "ImageInUse", (
                    f"{export.image} is served by pid {server.pid} for VM {server.mark.vm}, "
                    f"run {server.mark.run}"
                )
        for one in self.actual.foreign:
            if one.image == export.image:
                return "ImageLocked", (
                    f"{export.image} is served by {one.what} (pid {one.pid}), which is not ours: "
                    "it must let go first"
                )
        for call in self.ledger.calls:
            if call.vm != export.vm and call.state.active:
                for other in call.exports:
                    if other.image == export.image:
                        return (
                            "ImageInUse",
                            f"{export.image} belongs to the active run of {call.vm}",
                        )
        return None

    def serve(self, wanted: Sequence[Export], serving: Mapping[int, Server]) -> bool:
        """Plan every export up; True if the call may follow."""
        moved = self.moved(wanted, serving)
        new = [
            export
            for export in wanted
            if export.key not in serving and (moved or export_key(export) not in self.leases)
        ]
        ports = self.pool.take(len(new))
        if ports is None:
            self.wait(
                "PortPoolExhausted",
                f"{len(new)} port{'s are' if len(new) > 1 else ' is'} needed, "
                f"{len(self.pool)} of {self.desired.settings.ports} "
                f"({self.pool.size} ports) {'are' if len(self.pool) != 1 else 'is'} free; "
                "it goes on when others release theirs",
            )
            new_keys = {export.key for export in new}
            wanted = [export for export in wanted if export.key not in new_keys]
            if not any(export.key in serving for export in wanted):
                return False
        fresh = dict(zip([export.key for export in new], ports or (), strict=False))
        up = ports is not None
        for export in sorted(wanted, key=lambda one: one.position):
            server = serving.get(export.key)
            up &= self.disk(export, server, fresh.get(export.key))
        return up

    def moved(self, wanted: Sequence[Export], serving: Mapping[int, Server]) -> bool:
        """Whether a stranger on a leased port sends the VM to new ones: only before the intent."""
        if self.call and self.call.state.active:
            return False
        return any(
            lease.port in self.actual.listeners or lease.port in self.actual.unbindable
            for export in wanted
            if export.key not in serving and (lease := self.leases.get(export_key(export)))
        )

    def disk(self, export: Export, server: Server | None, fresh: Port | None) -> bool:
        """Plan one export; True if nothing stands in the way of its answering."""
        base: dict[str, Any] = {"vm": self.vm.name, "disk": export.key}
        lease = self.leases.get(export_key(export))
        if server is None:
            return self.down(export, base, lease, fresh)
        port = server.mark.port
        self.ports[export.key] = port
        wanted_lease = lease or self.lease(export, port)
        if lease is None or lease.port != port:
            wanted_lease = self.lease(export, port)
            why = "it runs with our mark, and the ledger does not know it"
            self.actions.append(
                Adopt(
                    **base,
                    cause="NotInLedger",
                    why=why,
                    export=export,
                    lease=wanted_lease,
                    server=server,
                )
            )
        if server.starting:
            self.actions.append(Wait(**base, cause="Starting", why=f"pid {server.pid} is starting"))
            return False
        fault = self.fault(export, server)
        if fault is None:
            return True
        cause, why = fault
        if cause == "SizeMismatch":
            self.actions.append(Refuse(**base, cause=cause, why=why))
            return False
        subject = f"keep pid {server.pid} on {port}"
        busy = in_use(server)
        if busy:
            named = "NoAnswerInUse" if cause == "NoAnswer" else f"{cause}InUse"
            self.actions.append(
                Hold(**base, cause=named, why=f"{why}, but {busy}", subject=subject)
            )
            return False
        active = self.call is not None and self.call.state.active
        if active and cause == "SpecChanged":
            held = f"{why}, but its run {self.call.run} is {self.call.state}"  # type: ignore[union-attr]
            self.actions.append(Hold(**base, cause="RunActive", why=held, subject=subject))
            return True
        if self.vm.protect:
            held = f"{why}, but the spec says `protect: true`"
            self.actions.append(Hold(**base, cause="Protected", why=held, subject=subject))
            return False
        self.actions.append(
            Restart(
                **base,
                cause=cause,
                why=why,
                export=export,
                lease=wanted_lease,
                server=server,
                taints=self.would_taint(export),
            )
        )
        return True

    def down(
        self, export: Export, base: dict[str, Any], lease: Lease | None, fresh: Port | None
    ) -> bool:
        """Plan an export that nothing serves."""
        image = self.actual.images.get(export.image)
        created = image is None or not image.exists
        if created:
            why = "it does not exist"
            self.actions.append(Create(**base, cause="ImageMissing", why=why, export=export))
        if fresh is not None:
            self.ports[export.key] = fresh
            why = "it is not running"
            if lease:
                stranger = self.actual.listeners.get(lease.port)
                why = f"its port {lease.port} was taken by {stranger or 'somebody'}"
            new = self.lease(export, fresh)
            cause = "PortTaken" if lease else "NotRunning"
            self.actions.append(Start(**base, cause=cause, why=why, export=export, lease=new))
            return True
        assert lease is not None
        self.ports[export.key] = lease.port
        stranger = self.actual.listeners.get(lease.port)
        if stranger:
            self.actions.append(
                Hold(
                    **base,
                    cause="PortTaken",
                    why=f"its port is held by {stranger}, and the appliance was told that port: "
                    "end that process, and the server comes back",
                    subject=f"cannot serve on {lease.port}",
                )
            )
            return False
        if not lease.started:
            why = "its port is leased, and it is not running"
            self.actions.append(
                Start(**base, cause="NotRunning", why=why, export=export, lease=lease)
            )
            return True
        taints = self.would_taint(export)
        why = "its server is gone"
        if taints:
            why += (
                "; a client had written, so acknowledged writes may be lost and the run will "
                "count as failed (ServerDied)"
            )
        self.actions.append(
            Restart(
                **base,
                cause="ProcessGone",
                why=why,
                export=export,
                lease=lease,
                server=None,
                taints=taints,
            )
        )
        return True

    def fault(self, export: Export, server: Server) -> tuple[str, str] | None:
        """What is wrong with a server that runs."""
        options = self.desired.settings.qemu_nbd
        right = argv(export, server.mark.port, self.desired.settings.hub, options)
        if server.argv[1:] != right[1:]:
            return "SpecChanged", f"it runs with {_first_difference(server.argv, right)}"
        if not server.listening:
            return (
                "ListensElsewhere",
                f"pid {server.pid} does not listen on port {server.mark.port}",
            )
        shaken = server.handshake
        if shaken is None or not shaken.answered:
            return "NoAnswer", f"it does not answer: {shaken.error if shaken else 'not asked'}"
        if export.size is not None and shaken.size != export.size:
            return "SizeMismatch", (
                f"it serves {format_size(shaken.size or 0)} ({shaken.size} bytes), the disk has "
                f"{format_size(export.size)} ({export.size} bytes)"
            )
        return None

    def would_taint(self, export: Export) -> bool:
        """Whether the death of its server may have lost what a client was told is written."""
        call = self.call
        if call is None or not call.state.active or export.read_only:
            return False
        if self.desired.settings.qemu_nbd.cache in ("writethrough", "directsync"):
            return False
        lease, image = self.leases.get(export_key(export)), self.actual.images.get(export.image)
        seen = lease is not None and lease.clients_seen
        return seen or image is None or not image.pristine

    def lease(self, export: Export, port: Port) -> Lease:
        return Lease(
            hub=self.desired.settings.hub,
            vm=self.vm.name,
            disk=export.key,
            run=export.run,
            attempt=export.attempt,
            port=port,
            since=self.now,
        )

    def refuse(self, cause: str, why: str, disk: int | None = None) -> None:
        self.actions.append(Refuse(vm=self.vm.name, disk=disk, cause=cause, why=why))

    def wait(self, cause: str, why: str) -> None:
        self.actions.append(Wait(vm=self.vm.name, cause=cause, why=why))


def export_key(export: Export) -> tuple[str, int, str, int]:
    """What a server's mark says of the export it serves."""
    return (export.vm, export.key, export.run, export.attempt)


def _first_difference(have: Sequence[str], want: Sequence[str]) -> str:
    for index, (one, two) in enumerate(zip(have[1:], want[1:], strict=False), 1):
        if one != two:
            option = want[index - 1] if want[index - 1].startswith("--") else ""
            return f"{option} {one}, wanted is {two}".strip()
    extra = [*have[len(want) :], *want[len(have) :]]
    return f"{len(have)} words, wanted are {len(want)}: {' '.join(extra)}"
