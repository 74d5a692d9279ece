"""What the disks of one VM need: images that fit, ports, servers that answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from reconciler.core.actions import (
    Action,
    Adopt,
    Create,
    Hold,
    Refuse,
    Release,
    Restart,
    Start,
    Wait,
)
from reconciler.core.actual import Actual, Image, Server
from reconciler.core.backoff import CRASH_LOOP, JITTER, LONGEST
from reconciler.core.call import Call, CallState
from reconciler.core.desired import Desired, Export, Vm
from reconciler.core.guards import broken_chain, in_use, unfit
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import argv
from reconciler.core.parents import Unfit, as_full, unfit_parent
from reconciler.core.ports import Pool
from reconciler.core.settings import QemuNbd
from reconciler.core.space import Room
from reconciler.core.units import Port, Seconds, format_duration, format_size

LOOPS: Final = (
    "its server ends again and again, soon after it was up; its log and the kernel's tell why. It "
    "is tried again every few minutes, and at once by reconciler apply"
)
"""Of a server in a crash loop; the same words each time, so that they are one event."""


class Disks:
    """The planning of one VM's disks; the rest of the VM is planned on top of it."""

    def __init__(
        self,
        desired: Desired,
        actual: Actual,
        ledger: Ledger,
        now: Seconds,
        vm: Vm,
        servers: list[Server],
        pool: Pool,
        room: Room,
        twin: str = "",
    ) -> None:
        self.desired, self.actual, self.ledger, self.now = desired, actual, ledger, now
        self.vm, self.servers, self.pool, self.room = vm, servers, pool, room
        self.twin = twin
        """Why this VM is another one under a new name; empty: it is not."""
        self.leases = {lease.key: lease for lease in ledger.of(vm.name)}
        self.actions: list[Action] = []
        self.ports: dict[int, Port] = {}
        self.call: Call | None = None
        self.ahead = ""
        self.unfit_parents: Mapping[int, Unfit] = {}
        """Disk key → why nothing can be built on its parent."""

    def match(self, wanted: Sequence[Export]) -> tuple[Mapping[int, Server], Sequence[Server]]:
        """The server of each wanted export, by disk key."""
        found = {export.key: self.server_for(export) for export in wanted}
        serving = {key: server for key, server in found.items() if server}
        return serving, list(serving.values())

    def server_for(self, export: Export) -> Server | None:
        key = export_key(export)
        found = [server for server in self.servers if server.mark.key == key]
        lease = self.leases.get(key)
        if lease:
            found.sort(key=lambda server: server.mark.port != lease.port)
        return found[0] if found else None

    def check(self, wanted: Sequence[Export], serving: Mapping[int, Server]) -> bool:
        """Whether every image can be served; all or none."""
        fit = True
        for export in wanted:
            if parent := self.unfit_parents.get(export.key):
                fit = False
                self.refuse(parent.cause, f"{parent.why}; {parent.remedy}", disk=export.key)
                continue
            if export.key in serving:
                continue
            image = self.actual.images.get(export.image) or Image(path=export.image, exists=False)
            wrong = unfit(export, image, held=self.holds(export))
            if not image.exists:
                wrong = wrong or self.gone(export)
            if not wrong:
                if export.read_only:
                    wrong = broken_chain(image, self.actual.images)
                else:
                    wrong = self.shared(export)
            if wrong:
                fit = False
                self.refuse(*wrong, disk=export.key)
        return fit

    @property
    def begun(self) -> bool:
        """Whether the run that rules this VM has begun: an SNA may have been told of its disks."""
        call = self.call
        return call is not None and call.state not in (CallState.DUE, CallState.REJECTED)

    def gone(self, export: Export) -> tuple[str, str] | None:
        """(cause, why) for which an image that is missing is not made anew: it was not empty."""
        call = self.call
        if call is None or not (call.state.active or call.state.terminal):
            return None
        stands = "active" if call.state.active else "ended"
        return "ImageMissing", f"{export.image} of the {stands} run is gone"

    def holds(self, export: Export) -> bool:
        """The ledger knows this image as this run's, and that an SNA was told to fill it."""
        call = self.call
        if call is None or call.state in (CallState.DUE, CallState.REJECTED):
            return False  # nobody was told of it, so what is in it is not ours
        return any((one.image, one.run) == (export.image, export.run) for one in call.exports)

    def judge_parents(self) -> None:
        """Whether an incremental that has not begun can build on what is there.

        Where it cannot, and the spec allows that, it is full instead: all of its disks. Once its
        row is in the ledger, that is decided for good.
        """
        vm, call = self.vm, self.call
        if vm.type != "incremental":
            return
        if call and call.run == vm.run and call.fallback:
            self.vm = as_full(vm, call.fallback)
            return
        if self.begun:
            return
        written = self.written()
        self.unfit_parents = {
            export.key: wrong
            for export in vm.exports
            if export.backing and (wrong := unfit_parent(export, self.ledger, self.actual, written))
        }
        images = (self.actual.images.get(export.image) for export in vm.exports)
        made = any(image and image.exists for image in images)  # as overlays: they stay that
        if self.unfit_parents and vm.fallback == "full" and not made:
            key, first = next(iter(self.unfit_parents.items()))
            self.vm = as_full(vm, f"disk {key}: {first.why}")
            self.unfit_parents = {}

    def written(self) -> Mapping[str, str]:
        """Image → who writes it: a server, or an active run, whose server may be down just now."""
        found = {
            export.image: f"run {call.run} of {call.vm}, which is {call.state}"
            for call in self.ledger.open
            if call.state.active
            for export in call.exports
        }
        return found | {
            server.argv[-1]: f"pid {server.pid}, VM {server.mark.vm}"
            for server in self.actual.servers
            if "--read-only" not in server.argv
        }

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
        for call in self.ledger.open:
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
        if len(new) > self.pool.size:
            self.refuse(
                "RangeTooSmall",
                f"{len(new)} ports are needed, and {self.desired.settings.ports} has "
                f"{_ports(self.pool.size)}: widen `ports: {{range: …}}` in the config",
            )
            return False
        ports = self.pool.take(len(new))
        if ports is None:
            self.wait(
                "PortPoolExhausted",
                f"{len(new)} port{'s are' if len(new) > 1 else ' is'} needed, {len(self.pool)} of "
                f"{self.desired.settings.ports} ({_ports(self.pool.size)}) "
                f"{'are' if len(self.pool) != 1 else 'is'} free; "
                "it goes on when others release theirs",
            )
            self.give_back(wanted, serving, "PortPoolExhausted")
            new_keys = {export.key for export in new}
            wanted = [one for one in wanted if one.key not in new_keys and one.key in serving]
        fresh = dict(zip([export.key for export in new], ports or (), strict=False))
        up = ports is not None
        for export in sorted(wanted, key=lambda one: one.position):
            server = serving.get(export.key)
            up &= self.disk(export, server, fresh.get(export.key))
        return up

    def fits(self, wanted: Sequence[Export], serving: Mapping[int, Server]) -> bool:
        """Whether there is room for a run that wants to begin; one that has begun goes on."""
        if self.begun or self.vm.purpose != "backup":
            return True
        short = self.room.take(self.vm.name, wanted)
        if short is None:
            return True
        self.refuse(*short)
        self.give_back(wanted, serving, short[0])
        return False

    def give_back(
        self, wanted: Sequence[Export], serving: Mapping[int, Server], cause: str
    ) -> None:
        """All ports or none: what a VM that waits has without a server, another may need."""
        if self.call and self.call.state.active:
            return
        for export in wanted:
            lease = self.leases.get(export_key(export))
            if lease and export.key not in serving:
                self.actions.append(
                    Release(
                        vm=self.vm.name,
                        disk=export.key,
                        cause=cause,
                        why="the VM cannot begin yet, and holds no port meanwhile",
                        lease=lease,
                    )
                )

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
        if lease is None or lease.port != port or not (lease.started or server.starting):
            if lease is None or lease.port != port:
                safe = QemuNbd(cache=_options(server.argv).get("--cache")).safe
                wanted_lease = replace(self.lease(export, port), safe=safe)
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
            return self.starting(export, server, wanted_lease, base)
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
        if active and cause == "ImageReplaced":
            held = f"{why}; put it back, or the run can only fail"
            self.actions.append(Hold(**base, cause=cause, why=held, subject=subject))
            return False
        if active and cause == "SpecChanged":
            held = f"{why}, but its run {self.call.run} is {self.call.state}"  # type: ignore[union-attr]
            self.actions.append(Hold(**base, cause="SpecChangedHeld", why=held, subject=subject))
            return True
        if self.vm.protect:
            held = f"{why}, but the spec says `protect: true`"
            self.actions.append(Hold(**base, cause="Protected", why=held, subject=subject))
            return False
        if not active and not self.image_for(export, base):
            return False
        self.actions.append(
            Restart(
                **base,
                cause=cause,
                why=why,
                export=export,
                lease=self.at_most(wanted_lease),
                server=server,
                taints=self.would_taint(export),
            )
        )
        return True

    def starting(self, export: Export, server: Server, lease: Lease, base: dict[str, Any]) -> bool:
        """A server in the small step before its exec; one that never leaves it is begun anew."""
        limit = self.desired.settings.qemu_nbd.start_timeout
        if server.age <= limit:
            self.actions.append(Wait(**base, cause="Starting", why=f"pid {server.pid} is starting"))
            return False
        why = (
            f"pid {server.pid} has been in the act of starting for {format_duration(server.age)}, "
            f"longer than start_timeout ({format_duration(limit)})"
        )
        self.actions.append(
            Restart(
                **base,
                cause="StartStuck",
                why=why,
                export=export,
                lease=self.at_most(lease),
                server=server,
            )
        )
        return True

    def image_for(self, export: Export, base: dict[str, Any]) -> bool:
        """Before a server is started anew on it: create the image, or say why it cannot be used."""
        image = self.actual.images.get(export.image) or Image(path=export.image, exists=False)
        wrong = unfit(export, image, held=self.holds(export))
        if not image.exists:
            wrong = wrong or self.gone(export)
        if not wrong and export.read_only:
            wrong = broken_chain(image, self.actual.images)
        if wrong:
            self.actions.append(Refuse(**base, cause=wrong[0], why=wrong[1]))
            return False
        if not image.exists:
            why = "it does not exist"
            self.actions.append(Create(**base, cause="ImageMissing", why=why, export=export))
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
            if self.would_taint(export):  # the ledger is older than the server that was there
                self.again(export, base, new, taints=True)
                return True
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
        taints = self.would_taint(export)
        if not lease.started and not taints:
            why = "its port is leased, and it is not running"
            self.actions.append(
                Start(
                    **base,
                    cause="NotRunning",
                    why=why,
                    export=export,
                    lease=self.lease(export, lease.port),
                )
            )
            return True
        deaths, until = self.died(lease)
        if until > self.now:
            self.rest(base, deaths, until)
            return False
        self.again(export, base, self.at_most(lease), taints=taints, deaths=deaths)
        return True

    def died(self, lease: Lease) -> tuple[int, Seconds]:
        """How often in a row its server has died young, and until when it is left down.

        Young is who did not live for `healthy_after`, nor for that long after the rest that its
        own start began: when it died is not known later, so of one that is started when its rest
        is over it cannot be said that it lived until then.
        """
        lived = self.now - max(lease.up, lease.rest)
        if not lease.up or lived >= self.desired.settings.loop.healthy_after:
            return 1, 0.0
        far = lease.rest - self.now > LONGEST * (1 + JITTER)  # the clock was set back since
        return lease.deaths + 1, 0.0 if far else lease.rest

    def rest(self, base: dict[str, Any], deaths: int, until: Seconds) -> None:
        """Leave down for a while what dies again and again. The words are the same every time."""
        if deaths < CRASH_LOOP:
            cause, why = "BackOff", f"its server has ended {deaths} times soon after it was up"
        else:
            cause, why = "CrashLoop", LOOPS
        self.actions.append(Wait(**base, cause=cause, why=why, until=until))

    def again(
        self,
        export: Export,
        base: dict[str, Any],
        lease: Lease,
        *,
        taints: bool,
        deaths: int = 0,
    ) -> None:
        """Plan the start of a server in the place of one that is gone."""
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
                lease=replace(lease, deaths=deaths),
                server=None,
                taints=taints,
                leased=self.leases.get(export_key(export)) == lease,
            )
        )

    def fault(self, export: Export, server: Server) -> tuple[str, str] | None:
        """What is wrong with a server that runs."""
        options = self.desired.settings.qemu_nbd
        right = argv(export, server.mark.port, self.desired.settings.hub, options)
        if server.argv[1:] != right[1:]:
            return "SpecChanged", f"it runs with {_first_difference(server.argv, right)}"
        if not server.holds_image:
            return "ImageReplaced", (
                f"pid {server.pid} has another file open than the one at {export.image}: the image "
                "was moved, deleted or replaced under it"
            )
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
        lease, image = self.leases.get(export_key(export)), self.actual.images.get(export.image)
        if lease is not None and lease.safe:
            return False
        seen = lease is not None and lease.clients_seen
        return seen or image is None or not image.pristine

    def at_most(self, lease: Lease) -> Lease:
        """The lease for another server of the same run: never safer than its servers were."""
        return replace(lease, safe=lease.safe and self.desired.settings.qemu_nbd.safe)

    def lease(self, export: Export, port: Port) -> Lease:
        return Lease(
            hub=self.desired.settings.hub,
            vm=self.vm.name,
            disk=export.key,
            run=export.run,
            attempt=export.attempt,
            port=port,
            since=self.now,
            safe=self.desired.settings.qemu_nbd.safe,
        )

    def refuse(self, cause: str, why: str, disk: int | None = None) -> None:
        self.actions.append(Refuse(vm=self.vm.name, disk=disk, cause=cause, why=why))

    def wait(self, cause: str, why: str, *, until: Seconds = 0.0) -> None:
        self.actions.append(Wait(vm=self.vm.name, cause=cause, why=why, until=until))


def export_key(export: Export) -> tuple[str, int, str, int]:
    """What a server's mark says of the export it serves."""
    return (export.vm, export.key, export.run, export.attempt)


def _ports(count: int) -> str:
    return f"{count} port{'s' if count != 1 else ''}"


def _first_difference(have: Sequence[str], want: Sequence[str]) -> str:
    """`--shared 5, wanted is --shared 10`: the first option in which two command lines differ."""
    one, two = _options(have), _options(want)
    for name in [*two, *one]:
        before, after = one.get(name), two.get(name)
        if before != after:
            shown = [
                f"{name} {value}".strip() if value is not None else "" for value in (before, after)
            ]
            return f"{shown[0] or f'no {name}'}, wanted is {shown[1] or f'no {name}'}"
    return "the same options in another order"


def _options(line: Sequence[str]) -> dict[str, str]:
    """Option → value; the image under its own name."""
    found: dict[str, str] = {}
    words = list(line[1:])
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            found["image"] = word
        elif words and not words[0].startswith("-") and (len(words) > 1 or "image" in found):
            found[word] = words.pop(0)
        else:
            found[word] = ""
    return found
