"""What cannot be looked at: leases, calls, events, the last applied state. SQLite, one writer.

Every change is one transaction that is on the disk when the method returns.
"""

from reconciler.host.store.files import NAME, StoreError, StoreLockedError, WrongHubError
from reconciler.host.store.reading import (
    archived,
    events,
    later_events,
    newest_events,
    proofs,
    read,
    state_id_of,
    steps,
    use_of_plan,
)
from reconciler.host.store.rows import Event, Use
from reconciler.host.store.writer import EVENT_DAYS, Store

__all__ = [
    "EVENT_DAYS",
    "NAME",
    "Event",
    "Store",
    "StoreError",
    "StoreLockedError",
    "Use",
    "WrongHubError",
    "archived",
    "events",
    "later_events",
    "newest_events",
    "proofs",
    "read",
    "state_id_of",
    "steps",
    "use_of_plan",
]
