"""What an operator orders about what is remembered: a value, and how it is carried out.

An order is carried out by who holds the lock: the command itself, or the daemon that it is handed
to. Nothing here asks or prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from msgspec import Struct

from reconciler.core.call import Call, CallEvent, CallState
from reconciler.core.errors import HostError, UsageError, nearest
from reconciler.core.ledger import Ledger
from reconciler.core.units import Seconds
from reconciler.core.vm_plan import new_run
from reconciler.host.store import Event, Store


class Order(Struct, frozen=True, kw_only=True, tag=True):
    """One order; `vms` are those that are worth a look afterwards."""

    vms: tuple[str, ...] = ()

    def carry_out(self, store: Store, who: str, now: Seconds) -> list[str]:
        """Do it; what to tell the operator. Raises ReconcilerError, and then nothing was done."""
        raise NotImplementedError


class Retry(Order, frozen=True, kw_only=True):
    """Ask again for a run that was refused or could not be sent."""

    def carry_out(self, store: Store, who: str, now: Seconds) -> list[str]:
        (vm,) = self.vms
        calls = calls_of(store.ledger(), vm)
        ready = [c for c in calls if c.state in (CallState.REJECTED, CallState.DUE)]
        if not ready:
            newest = calls[-1]
            help_ = (
                f"reconciler resolve {vm} --accepted | --completed | --failed | --resend"
                if newest.state.active
                else f"a run that has ended is not asked for again; for another: {new_run(vm)}"
            )
            raise HostError(f"cannot retry run {newest.run} of {vm}: it is {newest.state}; {help_}")
        call = ready[-1]
        store.advance(call, CallEvent.REARM, now, retry_at=0.0, failures=0, message="")
        event = Event(vm=vm, run=call.run, reason="Rearmed", message="by order of retry")
        store.record([event], who, now)
        return [f"run {call.run} of {vm} is DUE again."]


class Approve(Order, frozen=True, kw_only=True):
    """Let one revision of the watched directory take away what is more than the cap allows.

    Of that revision alone: it is named by its digest or its commit, or by their beginning.
    """

    LEAST: ClassVar[int] = 7
    """Characters of a name. Fewer are a guess."""

    revision: str
    reason: str = ""

    def carry_out(self, store: Store, who: str, now: Seconds) -> list[str]:
        waiting = store.ledger().source.get("waiting") or {}
        if not waiting:
            raise HostError(
                f"cannot approve {self.revision}: no revision waits for that; see reconciler status"
            )
        names = [str(waiting["digest"]), str(waiting["commit"])]
        exact = len(self.revision) >= self.LEAST
        if not (exact and any(name.startswith(self.revision) for name in names)):
            raise HostError(
                f"cannot approve {self.revision}: the one that waits is {waiting['name']}, which "
                f"takes away {len(waiting['vms'])} VMs ({', '.join(waiting['vms'][:8])}"
                f"{', …' if len(waiting['vms']) > 8 else ''})"
            )
        store.approve(names[0])
        said = f"revision {waiting['name']}, {len(waiting['vms'])} VMs"
        said += f": {self.reason}" if self.reason else ""
        store.record([Event(vm="", reason="Approved", message=said)], who, now)
        return [
            f"revision {waiting['name']} may take away: {', '.join(waiting['vms'])}.",
            "What is protected, in use or being written is held all the same.",
        ]


def calls_of(ledger: Ledger, vm: str) -> Sequence[Call]:
    """The calls of a VM, oldest first; at least one. Raises UsageError."""
    calls = sorted(ledger.runs(vm), key=lambda c: (c.created, c.attempt))
    if not calls:
        raise UsageError(f"the ledger has no run of a VM {vm!r}{nearest(vm, ledger.known)}")
    return calls
