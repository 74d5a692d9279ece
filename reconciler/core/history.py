"""The runs of one VM, newest first, as values; light, as `history` is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reconciler.core.call import Call
from reconciler.core.ledger import Ledger
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import Seconds, stamp


def runs(ledger: Ledger, vm: str) -> list[Call]:
    """Every attempt of every run of a VM, newest first."""
    return sorted(ledger.runs(vm), key=lambda call: (call.created, call.attempt), reverse=True)


def ended(call: Call) -> Seconds | None:
    """When a run ended; None: it has not. An old store knows only when it last changed."""
    if not call.state.terminal:
        return None
    return call.ended or call.changed


def duration(call: Call, now: Seconds) -> Seconds | None:
    """From the call to its end, or until now; None: it was not called, or nobody wrote when."""
    if not call.called:
        return None
    end = ended(call)
    if end is None and not call.state.active:
        return None
    return max(0.0, (now if end is None else end) - call.called)


def document(vm: str, shown: Sequence[Call], total: int, hub: str, now: Seconds) -> dict[str, Any]:
    """The history of a VM, as `history -o json` prints it."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "vm": vm,
        "total": total,
        "runs": [_run(call, now) for call in shown],
    }


def _run(call: Call, now: Seconds) -> dict[str, Any]:
    span, end = duration(call, now), ended(call)
    return {
        "run": call.run,
        "attempt": call.attempt,
        "type": call.type,
        "state": str(call.state),
        "reason": call.reason,
        "message": call.message,
        "asked": stamp(call.created),
        "called": stamp(call.called) if call.called else None,
        "ended": None if end is None else stamp(end),
        "seconds": None if span is None else round(span),
        "sna": call.sna,
        "job_id": call.job_id,
        "nbd_targets": call.targets or None,
        "who": call.who or None,
        "tainted": call.tainted,
        "fallback": call.fallback or None,
        "doubt": call.doubt or None,
    }
