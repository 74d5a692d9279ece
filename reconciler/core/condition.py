"""One thing that is true, false or unknown, and since when."""

from __future__ import annotations

from msgspec import Struct

from reconciler.core.ledger import Ledger
from reconciler.core.units import Seconds


class Condition(Struct, frozen=True):
    """One thing that is true, false or unknown of a VM or a tunnel, and why. Kubernetes-shaped."""

    type: str
    status: str
    reason: str
    message: str


def since(name: str, condition: Condition, ledger: Ledger, now: Seconds) -> Seconds:
    """When a condition came to have its status; now, if this is the first to see it."""
    known = ledger.transitions.get((name, condition.type))
    return known[2] if known and known[0] == condition.status else now
