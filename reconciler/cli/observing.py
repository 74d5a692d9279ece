"""Who is told what the daemon does: the log, the meters, systemd."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from reconciler import logs
from reconciler.core.actual import Actual
from reconciler.core.ledger import Ledger
from reconciler.core.plan import Plan
from reconciler.core.queue import Item
from reconciler.core.status import Condition, by_type
from reconciler.core.units import Seconds
from reconciler.daemon import WORKERS, Observers
from reconciler.execute import Step
from reconciler.meters import Meters

_ERRORS = ("a look failed", "a command failed", "cannot", "the config was not")


class Told(Observers):
    """All of them."""

    def __init__(self) -> None:
        logs.to_stderr()
        self.meters = Meters()
        self._looks = itertools.count(1)
        self._revision = ""

    def said(self, event: str, **fields: Any) -> None:
        level = "warning" if event.startswith(_ERRORS) else "info"
        logs.log(event, level=level, **fields)

    def stepped(self, step: Step) -> None:
        logs.log_step(step)

    def added(self, depth: int) -> None:
        self.meters.added(depth)

    def began(self, item: Item, waited: Seconds, depth: int) -> None:
        logs.bind(reconcile_id=f"{os.getpid()}-{next(self._looks)}", vm=item.name)
        self.meters.began(waited, depth)

    def ended(self, vm: str, result: str, took: Seconds, steps: Collection[Step]) -> None:
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
        self.meters.looked(planned, actual, ledger, ready)

    def sourced(self, ok_at: Seconds | None, held: int) -> None:
        self.meters.sourced(ok_at, held)

    def ready(self, counts: str) -> None:
        logs.log("ready", counts=counts)

    def beat(self, counts: str, working: Collection[Seconds]) -> None:
        self.meters.beat(working, WORKERS)
