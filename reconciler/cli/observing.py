"""Who is told what the daemon does: the log, the meters, systemd, the webhook."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from reconciler import logs
from reconciler.beside import Observers
from reconciler.core.actual import Actual
from reconciler.core.errors import HostError
from reconciler.core.ledger import Ledger
from reconciler.core.notices import Seen
from reconciler.core.plan import Plan
from reconciler.core.queue import Item
from reconciler.core.status import Condition, by_type
from reconciler.core.tunnel import PREFIX
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import VmPlan
from reconciler.daemon import WORKERS
from reconciler.execute import Step
from reconciler.host import systemd
from reconciler.host.store import Store
from reconciler.meters import Meters
from reconciler.notifier import Notifier, note_notices

_ERRORS = ("a look failed", "a command failed", "cannot", "the config was not")


class Told(Observers):
    """All of them."""

    def __init__(self) -> None:
        logs.to_stderr()
        self.meters = Meters()
        self.notifier: Notifier | None = None
        self.trouble: Callable[[], str] = lambda: ""
        """Why the daemon should be ended; empty: it moves."""
        self._ready = False
        self._looks = itertools.count(1)
        self._about: dict[str, dict[str, str]] = {}
        """VM → what every line says of the look at it that goes on, whatever thread writes it."""
        self._revision = ""

    def said(self, event: str, **fields: Any) -> None:
        level = "warning" if event.startswith(_ERRORS) else "info"
        logs.log(event, level=level, **fields)

    def stepped(self, step: Step) -> None:
        logs.log_step(step, **self._about.get(step.action.vm, {}))

    def reached(self, sna: str, well: bool | None) -> None:
        self.meters.reached(sna, well)

    def added(self, depth: int) -> None:
        self.meters.added(depth)

    def began(self, item: Item, waited: Seconds, depth: int) -> None:
        about = {"reconcile_id": f"{os.getpid()}-{next(self._looks)}", "revision": self._revision}
        self._about[item.name] = about
        logs.bind(vm=item.name, **about)
        self.meters.began(waited, depth)

    def ended(self, vm: str, result: str, took: Seconds, steps: Collection[Step]) -> None:
        self._about.pop(vm, None)
        logs.bind()  # what this thread says from now on is not of this look
        self.meters.ended(result, took, steps)

    def handed(self, steps: Collection[Step]) -> None:
        self.meters.stepped(steps)

    def looked(
        self,
        planned: Plan,
        actual: Actual,
        ledger: Ledger,
        found: Mapping[str, Sequence[Condition]],
    ) -> None:
        ready = {vm: by_type(some)["Ready"].status == "True" for vm, some in found.items()}
        held = sum("PruneHeld" in by_type(some) for some in found.values())
        self.meters.looked(planned, actual, ledger, ready, held)

    def noted(
        self,
        store: Store,
        planned: Plan,
        found: Mapping[str, Sequence[Condition]],
        now: Seconds,
    ) -> None:
        for tunnel in planned.tunnels:
            healthy = by_type(found[tunnel.name])["Ready"].status == "True"
            self.meters.tunnel(tunnel.name, healthy if tunnel.tunnel.up else None)
        if self.notifier and self.notifier.notify().url:
            seen = {
                one.name: Seen(_run(one), tuple(found[one.name]))
                for one in planned.all
                if one.name in found
            }
            self._told(store, seen, now)

    def gone(self, store: Store, names: Collection[str], now: Seconds) -> None:
        for name in names:
            if name.startswith(PREFIX):
                self.meters.tunnel(name, None)
        if self.notifier:
            self._told(store, {}, now, names)

    def _told(
        self,
        store: Store,
        seen: Mapping[str, Seen],
        now: Seconds,
        gone: Collection[str] = (),
    ) -> None:
        try:
            if note_notices(store, seen, now, gone) and self.notifier:
                self.notifier.kick()
        except HostError as error:  # who is told is no reason not to heal
            self.said("cannot note who is to be told", error=str(error))

    def sourced(self, ok_at: Seconds | None, revision: str) -> None:
        self._revision = revision
        self.meters.sourced(ok_at)

    def ready(self, counts: str) -> None:
        logs.log("ready", counts=counts)
        self._ready = True
        systemd.notify("READY=1", f"STATUS={counts}")

    def beat(self, counts: str, working: Collection[Seconds]) -> None:
        self.meters.beat(working, WORKERS)
        trouble = self.trouble()
        status = trouble or (counts if self._ready else f"looking at every VM once: {counts}")
        systemd.notify(*([] if trouble else ["WATCHDOG=1"]), f"STATUS={status}")

    def reloading(self) -> None:
        systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        if self._ready:
            systemd.notify("READY=1")

    def ending(self) -> None:
        systemd.notify("STOPPING=1")


def _run(one: VmPlan | TunnelPlan) -> str:
    if isinstance(one, TunnelPlan):
        return ""
    return one.call.run if one.call and one.call.state.active else one.vm.run
