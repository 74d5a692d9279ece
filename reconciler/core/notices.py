"""Which troubles of VMs somebody is told of: each once as it begins, and once when it is over.

A trouble is a (VM, run, reason). What is open is in the store, so nothing is told twice, whoever
restarts. One that comes back within `SETTLED` was never over: it is told neither as ended nor anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import Struct

from reconciler.core.status import Condition
from reconciler.core.units import Seconds, stamp

SETTLED: Final[Seconds] = 60.0
"""How long a trouble has to stay away until it is over: two looks of a resync."""
BEGUN: Final = "nbd-reconciler.trouble.begun"
RESOLVED: Final = "nbd-reconciler.trouble.resolved"
"""Types of the messages. Source: CloudEvents 1.0, `type`."""
MEDIA_TYPE: Final = "application/cloudevents+json; charset=utf-8"
"""Source: CloudEvents 1.0, HTTP protocol binding, structured content mode."""
_KINDS: Final = frozenset({"Stalled", "SourceUnreadable", "PruneHeld", "Stale"})
"""Conditions that are a trouble while they are true."""
_LOST: Final = frozenset({"RunFailed", "ServerDied"})
"""Reasons of `Ready` that nothing but a new run helps against."""

Key = tuple[str, str, str]
"""VM, run, reason."""


class Seen(Struct, frozen=True):
    """What was found of a VM in a look."""

    run: str
    """The run that its conditions are about; empty: none."""
    conditions: Sequence[Condition]


class Notice(Struct, frozen=True, kw_only=True):
    """A trouble that somebody was told of, and not yet that it is over."""

    vm: str
    run: str
    reason: str
    since: Seconds
    message: str
    gone: Seconds = 0.0
    """When it was not there any more; 0: it is."""

    @property
    def key(self) -> Key:
        return (self.vm, self.run, self.reason)


class Turn(Struct, frozen=True, kw_only=True):
    """What a look changes about the open notices."""

    begun: tuple[Notice, ...] = ()
    ebbed: tuple[Notice, ...] = ()
    """Not there just now; over if that lasts."""
    back: tuple[Notice, ...] = ()
    """There again, before it was over."""
    resolved: tuple[Notice, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.begun or self.ebbed or self.back or self.resolved)


def turn(
    seen: Mapping[str, Seen],
    known: Collection[Notice],
    now: Seconds,
    gone: Collection[str] = (),
) -> Turn:
    """What begins and what is over, by what was found of some VMs. Of others nothing is known;
    nothing is wanted any more of those in `gone`."""
    there = dict(_troubles(seen, now))
    open_keys = {one.key for one in known}
    looked = [one for one in known if one.vm in seen or one.vm in gone]
    away = [one for one in looked if one.key not in there]
    back = [one for one in looked if one.key in there and one.gone]
    returned = {one.key for one in back}
    return Turn(
        begun=tuple(one for key, one in there.items() if key not in open_keys),
        ebbed=tuple(_ebbed(one, now) for one in away if not one.gone),
        back=tuple(back),
        resolved=tuple(
            one
            for one in known
            if one.gone and now - one.gone >= SETTLED and one.key not in returned
        ),
    )


def _ebbed(notice: Notice, now: Seconds) -> Notice:
    return Notice(
        vm=notice.vm,
        run=notice.run,
        reason=notice.reason,
        since=notice.since,
        message=notice.message,
        gone=now,
    )


def _troubles(seen: Mapping[str, Seen], now: Seconds) -> Iterable[tuple[Key, Notice]]:
    for vm, one in seen.items():
        for condition in one.conditions:
            reason = trouble(condition)
            if reason:
                found = Notice(
                    vm=vm, run=one.run, reason=reason, since=now, message=condition.message
                )
                yield found.key, found


def trouble(condition: Condition) -> str:
    """The reason by which a condition is a trouble; empty: it is none.

    A server that is down is none: it is healed, and what keeps it from that is Stalled. Nor is what
    a person ordered.
    """
    if condition.type in _KINDS and condition.status == "True":
        return "" if condition.reason == "Paused" else condition.reason
    if condition.type == "Ready" and condition.status == "False" and condition.reason in _LOST:
        return condition.reason
    if condition.type == "Notified" and condition.reason == "Unknown":
        return "CallUnknown"
    return ""


def body(notice: Notice, kind: str, *, hub: str, now: Seconds) -> str:
    """The message, as it is posted: a CloudEvent 1.0 in structured JSON.

    Its id is the same however often it is made, so that a receiver can tell a repetition.
    """
    over = kind == RESOLVED
    data: dict[str, Any] = {
        "hub": hub,
        "vm": notice.vm,
        "run": notice.run or None,
        "reason": notice.reason,
        "message": notice.message,
        "state": "resolved" if over else "begun",
        "since": stamp(notice.since),
        "until": stamp(notice.gone) if over else None,
        "command": f"reconciler explain {notice.vm}",
    }
    identity = "\n".join((hub, *notice.key, repr(notice.since), kind))
    event = {
        "specversion": "1.0",
        "id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "source": f"/hubs/{hub}",
        "type": kind,
        "subject": f"{notice.vm}/{notice.run}" if notice.run else notice.vm,
        "time": stamp(now),
        "datacontenttype": "application/json",
        "data": data,
    }
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


def bodies(found: Turn, *, hub: str, now: Seconds) -> list[str]:
    """The messages of a turn, what is over first."""
    return [
        *(body(one, RESOLVED, hub=hub, now=now) for one in found.resolved),
        *(body(one, BEGUN, hub=hub, now=now) for one in found.begun),
    ]
