"""Conditions of tunnels, and how they stand, as values."""

from __future__ import annotations

from typing import Any, Final

from reconciler.core.actions import CHANGES
from reconciler.core.actual import Actual
from reconciler.core.condition import Condition, since
from reconciler.core.ledger import Ledger
from reconciler.core.tunnel_plan import TunnelPlan
from reconciler.core.tunnel_seen import Dialled, TunnelSeen
from reconciler.core.units import Seconds, stamp

_NO_TROUBLE: Final = frozenset({"Paused", "InUse"})
"""Holds that are the ordinary way of things and not a fault."""
_PERSON: Final = frozenset(
    {
        "AuthenticationFailed",
        "ForwardRefused",
        "HostKeyMismatch",
        "IdentityUnusable",
        "LocalPortBusy",
        "NoCommonCipher",
        "SshUsage",
    }
)
"""Waits that no time ends: a person is needed."""
OFTEN: Final = 3
"""Failures in a row after which somebody is to be told, whatever the layer: half a minute."""


def conditions(one: TunnelPlan, actual: Actual, ledger: Ledger) -> list[Condition]:
    """What is true of a tunnel; the reason of `Ready` names the layer that fails."""
    seen = actual.tunnels.get(one.name, TunnelSeen())
    pending = [action for action in one.actions if action.kind in CHANGES]
    faults = [action for action in one.actions if action.kind in ("hold", "refuse")]
    pause = next((action for action in faults if action.cause == "Paused"), None)
    blocked = [*faults, *one.waits, *pending]
    up = connected(one, seen)
    parts = len(one.tunnel.parts)

    def said(kind: str, true: bool, reason: str, message: str) -> Condition:
        return Condition(kind, "True" if true else "False", reason, message)

    if pause and blocked == [pause] and (up == parts if one.tunnel.up else not seen.lines):
        blocked = faults = []
    found = []
    if blocked:
        found.append(said("Ready", False, blocked[0].cause, blocked[0].why))
    elif one.tunnel.up:
        told = "; ".join(check.message for check in seen.checks if not check.reason)
        found.append(said("Ready", True, "Healthy", told or f"{up} of {parts} connections are up"))
    else:
        found.append(said("Ready", True, "Down", "it is declared to be down, and nothing runs"))
    busy = [*pending, *one.waits]
    found.append(
        said("Reconciling", True, busy[0].cause, busy[0].why)
        if busy
        else said("Reconciling", False, "NothingToDo", "nothing is to be changed")
    )
    stalled = [action for action in faults if action.cause not in _NO_TROUBLE]
    often = {
        known.reason
        for (name, _), known in ledger.dialled.items()
        if name == one.name and known.failures >= OFTEN
    }
    stalled += [wait for wait in one.waits if wait.cause in _PERSON | often]
    found.append(
        said("Stalled", True, stalled[0].cause, stalled[0].why)
        if stalled
        else said("Stalled", False, "NotStalled", "nothing stands in the way")
    )
    found.append(
        said("Paused", True, "Paused", pause.why)
        if pause
        else said("Paused", False, "NotPaused", "nobody has paused it")
    )
    if one.tunnel.up:
        message = f"{up} of {parts} connections are let in and listen"
        found.append(said("Connected", up == parts, "LetIn" if up == parts else "NotYet", message))
    held = (ledger.source.get("held") or {}).get(one.name)
    if held:
        found.append(Condition("SourceUnreadable", "True", *held))
    if one.tunnel.up and one.tunnel.name not in ledger.source.get("tunnels", (one.tunnel.name,)):
        message = (
            "the watched directory declares no such tunnel any more; it stays as it was applied, "
            f"and is dialled again: to end it: reconciler stop {one.name}"
        )
        found.append(Condition("PruneHeld", "True", "NoSpec", message))
    return found


def connected(one: TunnelPlan, seen: TunnelSeen) -> int:
    """Connections that are let in: their ssh listens on every port of its own."""
    return len(
        {
            line.mark.part
            for line in seen.lines
            if line.mark.part in one.tunnel.parts
            and line.listening.issuperset(one.tunnel.ports(line.mark.part))
        }
    )


def tunnel_json(one: TunnelPlan, actual: Actual, ledger: Ledger, now: Seconds) -> dict[str, Any]:
    """One tunnel, as `status -o json` prints it."""
    tunnel, seen = one.tunnel, actual.tunnels.get(one.name, TunnelSeen())
    applied = ledger.tunnels.get(one.name)
    lines = {line.mark.part: line for line in seen.lines}
    rows = []
    for part in tunnel.parts if tunnel.up else sorted(lines):
        known = ledger.dialled.get((one.name, part), Dialled(tunnel=one.name, part=part))
        line = lines.get(part)
        again = known.rest if known.rest > now else one.again_at
        rows.append(
            {
                "part": part,
                "pid": line.pid if line else None,
                "forwards": len(tunnel.ports(part)),
                "listening": len(line.listening) if line else 0,
                "clients": line.clients if line else 0,
                "upSince": stamp(known.up) if line and known.is_of(line) else None,
                "restarts": known.restarts,
                "failures": known.failures,
                "refused": list(known.refused),
                "lastFailure": known.reason or None,
                "nextTry": stamp(again) if line is None and again > now else None,
            }
        )
    return {
        "name": tunnel.name,
        "state": "up" if tunnel.up else "down",
        "hub": tunnel.target,
        "reverse": str(tunnel.reach.listens),
        "observedGeneration": applied.generation if applied else 0,
        "conditions": [
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                "lastTransitionTime": stamp(since(one.name, condition, ledger, now)),
            }
            for condition in conditions(one, actual, ledger)
        ],
        "connections": rows,
    }
