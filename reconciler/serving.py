"""Bringing runs to their end: a pass whenever somebody says that a VM is worth a look."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from reconciler.core.call import CallState
from reconciler.core.desired import Desired, Vm
from reconciler.core.errors import Diagnostic, HostError, ReconcilerError
from reconciler.core.ledger import Ledger
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds
from reconciler.loop import Applier, Desire, Outcome, current

POLL: Final[Seconds] = 10.0
"""Between two looks where no SNA is configured; else it is the shortest `poll` of one."""


def unfinished(ledger: Ledger) -> dict[str, Vm]:
    """The VMs whose run has something left to be done, as they were applied last.

    An SNA may be acting on it, or it is still to be called, or it has ended and its ports are
    still taken.
    """
    vms = {name: Vm.from_json(applied.vm) for name, applied in ledger.applied.items()}
    return {name: vm for name, vm in vms.items() if _open(vm, ledger)}


def _open(vm: Vm, ledger: Ledger) -> bool:
    if ledger.active(vm.name):
        return True
    if not vm.exported:
        return bool(ledger.of(vm.name))
    if vm.purpose != "backup":
        return False
    call = ledger.latest(vm.name, vm.run)
    if call is None or call.state is CallState.DUE:
        return True
    released = vm.release == "on_completion" and call.state.terminal
    return released and bool(ledger.of(vm.name))


def merged(config: Settings, ledger: Ledger) -> Settings:
    """What was applied last, and from the config what is never written down: the ways to secrets,
    and how an SNA is spoken to."""
    applied = Settings.from_json(ledger.settings)
    return replace(applied, snas=config.snas, vcenters=config.vcenters, listen=config.listen)


def last_applied(
    settings: Settings, known: Mapping[str, object], stale: Callable[[], str] = str
) -> Desire:
    """What was applied last of every VM that is not finished.

    `known` is the ledger's settings from which `settings` were made. `stale`: why no run may begin;
    asked only if one would.
    """

    def wanted(ledger: Ledger) -> Desired:
        if ledger.settings != known:
            raise HostError("another command applied other settings just now")
        vms = unfinished(ledger)
        missing = {name: why for name, vm in vms.items() if (why := _lacks(vm, settings, ledger))}
        return Desired(
            settings=settings,
            vms={name: vm for name, vm in vms.items() if name not in missing},
            diagnostics=tuple(Diagnostic("error", why) for why in missing.values()),
            stale=stale() if any(_due(vm, ledger) for vm in vms.values()) else "",
        )

    return wanted


def _inventory_told(config: Settings) -> str:
    """Why no run may begin: who knows all disks cannot be asked. Empty: nothing speaks against."""
    if not (config.inventory or config.inventory_sql):
        return ""
    from reconciler.inventories import reader_of

    found = reader_of(config).read().inventory
    return found.told() if found else ""


def _due(vm: Vm, ledger: Ledger) -> bool:
    """Whether its run has still to begin."""
    call = ledger.latest(vm.name, vm.run)
    return vm.exported and vm.purpose == "backup" and not (call and call.state.active)


def _lacks(vm: Vm, settings: Settings, ledger: Ledger) -> str:
    """Why a VM cannot be called for by this config; empty: it can, or need not be."""
    due = _due(vm, ledger)
    for section, name, there in (
        ("snas", vm.sna, settings.snas),
        ("vcenters", vm.vcenter, settings.vcenters),
    ):
        if due and name not in there:
            return (
                f"VM {vm.name}: run {vm.run} is not called for: it was applied with {name!r} of "
                f"`{section}`, which the config does not have any more; apply its spec again"
            )
    return ""


@dataclass(slots=True)
class Keeper:
    """Makes passes until it is told to end."""

    applier: Applier
    reload: Callable[[], Settings]
    """Reads the config; raises ReconcilerError."""
    say: Callable[[str], None]
    check: Callable[[], None] = lambda: None
    """Raises ReconcilerError if it makes no sense to go on."""
    kicked: threading.Event = field(default_factory=threading.Event)
    _config: Settings | None = None
    _told: dict[str, str] = field(default_factory=dict)

    def kick(self, _vm: str) -> None:
        """Look again. One look serves many kicks."""
        self.kicked.set()

    def run(self) -> None:
        """Look, rest, look again. Returns when `applier.stopping` is set."""
        while True:
            self.kicked.clear()  # before looking, so that a kick during the pass is not lost
            self.check()
            try:
                self.look()
                self.once("pass", "")
            except ReconcilerError as error:
                self.once("pass", f"warning: {error}; looking again")
            if self.applier.stopping.is_set():
                return
            self.kicked.wait(self.rest())

    def look(self) -> Outcome | None:
        """One round of passes over what is not finished; None: everything is."""
        config = self.config()
        ledger = current(config)
        if not ledger.settings or not unfinished(ledger):
            return None
        self.applier.settings = merged(config, ledger)
        wanted = last_applied(
            self.applier.settings, ledger.settings, lambda: _inventory_told(config)
        )
        outcome = self.applier.apply(wanted, impatient=False, note=False)
        assert outcome is not None
        self.tell(outcome)
        return outcome

    def config(self) -> Settings:
        """The config as it is now; while it cannot be used, as it was."""
        try:
            fresh = self.reload()
        except ReconcilerError as error:
            if self._config is None:
                raise
            self.once("config", f"warning: {error}; going on with the config as it was")
            return self._config
        was = self._config or fresh
        fixed = ("hub", "state", "listen")
        moved = [name for name in fixed if getattr(was, name) != getattr(fresh, name)]
        self.once(
            "config",
            f"warning: {', '.join(moved)} changed in the config; that takes a restart"
            if moved
            else "",
        )
        self._config = replace(fresh, hub=was.hub, state=was.state, listen=was.listen)
        return self._config

    def rest(self) -> Seconds:
        snas = self._config.snas.values() if self._config else ()
        return min((sna.poll for sna in snas), default=POLL)

    def tell(self, outcome: Outcome) -> None:
        """What stands in the way of each VM, when that is news."""
        for one in outcome.plan.vms:
            lines = [
                f"{one.name}{f' disk {a.disk}' if a.disk is not None else ''}: "
                f"{a.kind}: {a.cause}: {a.why}"
                for a in one.actions
                if a.kind in ("hold", "refuse", "wait")
            ]
            self.once(one.name, "\n".join(dict.fromkeys(lines)))
        findings = outcome.plan.diagnostics
        self.once("specs", "\n".join(map(str, findings)))

    def once(self, subject: str, text: str) -> None:
        """Say something about a subject, unless it was the last thing said of it."""
        if text and self._told.get(subject) != text:
            self.say(text)
        self._told[subject] = text
