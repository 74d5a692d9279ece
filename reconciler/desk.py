"""What the daemon can do for who asks at the API: the same as for a command, and at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from reconciler.asking import LOCK, Desk, pids_of, told
from reconciler.core.actions import CHANGES
from reconciler.core.call import Call, due_call
from reconciler.core.errors import HostError, LockError
from reconciler.core.ledger import Ledger
from reconciler.core.parents import PARENTS, without_command
from reconciler.core.queue import Priority
from reconciler.core.vm_plan import VmPlan
from reconciler.daemon import Daemon, Work
from reconciler.handover import until
from reconciler.look import Observer
from reconciler.loop import Source
from reconciler.orders import Cancel


class DaemonDesk(Desk):
    """Its memory and its eyes are the daemon's."""

    starts = ""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(lambda: daemon.settings, daemon.environment, daemon.kick)
        self.daemon = daemon

    def ledger(self) -> Ledger:
        return self.daemon.store.ledger()

    def source(self) -> Source:
        reading = self.daemon.reading
        if reading is None:
            raise HostError("the specs were not read yet: try again in a moment", "NotReady")
        if self.daemon.stopping.is_set():
            raise HostError("the daemon is ending: try again when it is back", "NotReady")
        return Source(reading.specs, reading.inventory)

    def standing(self, call: Call) -> str:
        reading = self.daemon.reading
        for one in reading.diagnostics if reading else ():
            if one.severity == "error" and one.vm == call.vm:
                return told([one])
        planned = self.daemon.last.get(call.vm)
        if planned is None or planned.vm.run != call.run:
            return ""
        if any(action.kind in CHANGES for action in planned.actions):
            return ""
        return next(_standing(planned), "")

    def pids(self, calls: Sequence[Call]) -> Mapping[tuple[str, str, int], Mapping[int, int]]:
        return pids_of(self.daemon.roster.of({call.vm for call in calls}), calls)

    def wanted(self) -> Sequence[Call]:
        ledger = self.ledger()
        found = []
        for one in list(self.daemon.last.values()):
            vm = one.vm
            if vm.exported and vm.purpose == "backup" and vm.exports and one.call is None:
                applied = ledger.applied.get(vm.name)
                when = applied.at if applied else time.time()
                found.append(due_call(self.settings.hub, vm, when, self.daemon.command))
        return found

    def asked(self, _vm: str) -> None:
        self.daemon.reread()

    def carry_out(self, order: Cancel, who: str) -> None:
        daemon = self.daemon
        if not until(time.monotonic() + LOCK, lambda: daemon.reserve(order.vms)):
            raise LockError(
                f"cannot change {', '.join(order.vms)}: the daemon is at work on it for longer "
                f"than {LOCK:g} s; try again"
            )
        try:
            eyes = Observer(daemon.settings, daemon.environment)
            order.carry_out(daemon.store, who, time.time(), eyes)
            if order.leaves(daemon.store.ledger()):
                work = Work(daemon, daemon.observers.stepped, asks=True, command=who)
                outcome = work.apply(partial(self.gone, order), order=True)
                assert outcome is not None
                daemon.settled(outcome, order.vms)
                daemon.observers.handed(outcome.steps)
        finally:
            daemon.free(order.vms)
        for name in order.vms:
            daemon.kick(name, Priority.CRASHED)


def _standing(planned: VmPlan) -> Iterator[str]:
    for action in planned.actions:
        if action.kind in ("refuse", "hold", "wait") and action.cause != "Starting":
            why = action.why
            if action.cause in PARENTS:
                why = f"{without_command(why, action.vm)}; only a `backup_type` full gets past it"
            yield f"{action.cause}: {why}"
