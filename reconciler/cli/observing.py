"""Who is told what the daemon does: the log, the meters, systemd, the webhook."""

from __future__ import annotations

from typing import Any

from reconciler.cli.options import say
from reconciler.core.queue import Item
from reconciler.core.settings import Settings
from reconciler.daemon import Observers
from reconciler.execute import Step


class Told(Observers):
    """Lines on stderr."""

    def said(self, event: str, **fields: Any) -> None:
        say(" ".join([event, *(f"{key}={value}" for key, value in fields.items())]), err=True)

    def stepped(self, step: Step, item: Item | None) -> None:
        self.said("step", vm=step.action.vm, ok=step.ok, message=step.message)

    def ready(self, counts: str) -> None:
        self.said("ready", counts=counts)


def observers(_settings: Settings) -> Told:
    return Told()
