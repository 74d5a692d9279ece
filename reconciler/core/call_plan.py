"""What became of the call of one VM, as far as anybody can tell; and how its run ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from msgspec.structs import replace

from reconciler.core.actions import Conclude, Hold, Witness
from reconciler.core.actual import Actual, Server
from reconciler.core.call import Call, CallEvent, CallState, Report, job_id, resolving
from reconciler.core.desired import Export, at_attempt
from reconciler.core.disk_plan import Disks, export_key
from reconciler.core.guards import in_use, unfit
from reconciler.core.ledger import DiskReport, Ledger, Telemetry
from reconciler.core.mark import export_of
from reconciler.core.settings import Settings
from reconciler.core.units import Bytes, Seconds, format_duration, format_size, stamp

LOST: Final = "ClaimWithoutRecord"
"""Reason of a call that only a claim in the repository tells of."""
LOOKS_APART: Final[Seconds] = 2.0
"""Between two looks in which clients on every disk count as a witness: a scanner does not stay."""
NOT_AGAIN: Final = ". It is not called again by itself"
"""Behind what is known of an unknown call, in a plan; not part of what is remembered of it."""


class Calls(Disks):
    """The planning of one VM's call, on top of its disks."""

    @property
    def declared(self) -> bool:
        """The watched directory declares this VM, as far as is remembered."""
        known = self.ledger.declared.get(self.vm.name)
        return known is not None and not known.gone

    def remembered(self) -> Call | None:
        """The call that rules this VM now: the active one, else that of the wanted run."""
        outdated = [call for call in self.ledger.open if self.is_outdated(call)]
        found = self.ledger.active(self.vm.name) or next(iter([*outdated, *self.lost]), None)
        if not found and self.vm.run and self.vm.purpose == "backup":
            found = self.ledger.latest(self.vm.name, self.vm.run)
        # The ledger may be older than what happened to the run, or have lost it.
        marked = found and found.key in self.actual.tainted
        return replace(found, tainted=True) if found and marked else found

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
                why=f"{said}{NOT_AGAIN}; when you know: {resolving(call)}",
                subject="the outcome of the call is unknown",
                event=event,
                remember=call not in self.ledger.open,
            )
        )

    def silence(self) -> tuple[str, str]:
        """(cause, why) for which a run seems to be given up, or is only silent for too long; empty:
        neither.

        It is no verdict: a client may be slow, or its way to us shut.
        """
        call = self.call
        if call is None or call.state is not CallState.ACCEPTED or self.all_reported(call):
            return "", ""
        if given_up := self.given_up(call):
            cause, why = given_up
            return cause, f"{why}: {self.signs(call)}"
        if not silent(call, self.ledger, self.desired.settings, self.now):
            return "", ""
        words = words_of(call, self.ledger)
        since = stamp(max(words, default=call.changed))
        said = f"not a word has come of it since {since}, when it was accepted"
        if words:
            said = f"nothing was heard of it since {since}"
        return "NoTelemetry", f"{said}: {self.signs(call)}"

    def given_up(self, call: Call) -> tuple[str, str] | None:
        """(cause, why) for which nobody works on an accepted run any more, as far as its SNA says
        and can be seen; None: nothing speaks for that."""
        known = self.ledger.words.get(call.job_id)
        report = self.actual.reports.get(call.job_id) or (known.report if known else None)
        if report is None or not self.idle(call):
            return None
        sna = f"SNA {call.sna}"
        if report.known is None:
            return "ApplianceGone", f"{sna} cannot be asked about it ({report.message})"
        if not report.known:
            return "ApplianceForgot", f"{sna} does not know it any more"
        said = f": {report.message}" if report.message else ""
        if report.status == "failed":
            return "ApplianceFailed", f"{sna} says that it has failed{said}"
        if report.status == "completed":
            arrived = len(self.ledger.reports.get(call.job_id, {}))
            return "ApplianceCompleted", (
                f"{sna} says that it has completed{said}, and its client reported "
                f"{arrived} of {len(call.exports)} disks here"
            )
        return None

    def idle(self, call: Call) -> bool:
        """Nobody is connected to any disk of a run."""
        servers = [self.server_for(export) for export in call.exports]
        return bool(servers) and not any(server and server.clients for server in servers)

    def worth_asking(self) -> bool:
        """Whether the SNA of an accepted run should be asked, although it is for its client to
        speak: nobody is connected to any disk, or nothing was heard for too long."""
        call = self.call
        if call is None or call.state is not CallState.ACCEPTED or self.all_reported(call):
            return False
        return self.idle(call) or silent(call, self.ledger, self.desired.settings, self.now)

    def unheard(self) -> str:
        """Why what its client reports is lost; empty: it is taken, or nothing is to come."""
        call = self.call
        if call is None or not call.state.active or self.all_reported(call):
            return ""
        why = self.actual.unheard
        if not why:
            return ""
        sna = self.desired.settings.snas.get(call.sna)
        until = (
            "ends with an apply at the earliest"
            if sna and sna.reports_end
            else "does not end by itself"
        )
        return f"its run {until}, as {why}: what its client reports is lost"

    def signs(self, call: Call) -> str:
        """What can be seen of an active run: its servers, its clients, its images."""
        servers = [self.server_for(export) for export in call.exports]
        total = len(servers)
        up = sum(bool(one and one.handshake and one.handshake.answered) for one in servers)
        busy = sum(bool(one and one.clients) for one in servers)
        images = [self.actual.images.get(export.image) for export in call.exports]
        written = max((image.written for image in images if image and image.exists), default=0.0)
        found = f"{up} of {total} servers answer, clients are connected to {busy} of {total} disks"
        return f"{found}; the images were written last at {stamp(written)}" if written else found

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
            export
            for export in call.exports
            if self.server_for(export) is None and self.would_taint(export)
        ]
        if status != "completed":
            event, cause, why = CallEvent.FAIL, "RunFailed", f"SNA {call.sna}: {message}"
            if call.exports and (call.tainted or dead):
                event, cause = CallEvent.SERVER_DIED, "ServerDied"
                why = f"a server died under a client; {why}"
            self.end(call, event, cause, why)
            return
        unseen = [image for e in call.exports if (image := self.unseen(e))]
        if unseen:
            why = f"{'; '.join(unseen)}: before that is known, the run is not ended"
            self.actions.append(Hold(vm=self.vm.name, call=call, cause="ImageUnreadable", why=why))
            return
        lost = [export.image for export in call.exports if self.image_lost(export)]
        if lost:
            self.end(
                call,
                CallEvent.FAIL,
                "ImageLost",
                f"{', '.join(lost)}: moved, deleted or replaced under its server; the run is "
                f"failed although SNA {call.sna} reports completed",
            )
        elif not call.exports:
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
        reports = self.ledger.reports.get(call.job_id, {})
        self.actions.append(
            Conclude(
                vm=self.vm.name,
                call=call,
                event=event,
                cause=cause,
                why=why,
                servers=up,
                told={position: report.bytes for position, report in reports.items()},
            )
        )


def words_of(call: Call, ledger: Ledger) -> list[Seconds]:
    """When its client was heard of a run that is under way; empty: never yet."""
    return heard_at(ledger.telemetry.get(call.job_id), ledger.reports.get(call.job_id, {}))


def heard_at(told: Telemetry | None, reports: Mapping[int, DiskReport]) -> list[Seconds]:
    """When a client was heard, by its telemetry and by its reports of disks."""
    return [*(report.at for report in reports.values()), *([told.at] if told else [])]


def silent(call: Call, ledger: Ledger, settings: Settings, now: Seconds) -> bool:
    """Whether nothing was heard of an accepted run for `stale_after`.

    With `reports_end` it is the SNA that is asked, with every look.
    """
    return silent_since(call, words_of(call, ledger), settings, now) is not None


def silent_since(
    call: Call, words: Sequence[Seconds], settings: Settings, now: Seconds
) -> Seconds | None:
    """Since when, if it is `silent`. `words`: when its client was heard."""
    sna = settings.snas.get(call.sna)
    if call.state is not CallState.ACCEPTED or (sna and sna.reports_end):
        return None
    last = max(words, default=call.changed)
    return last if now - last >= settings.loop.stale_after else None


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
