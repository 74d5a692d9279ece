"""Following a run: its events and its state as server-sent events, without a thread of its own.

Source of the form: HTML, server-sent events, 9.2.6.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from fastapi.responses import Response, StreamingResponse

from reconciler.api.answers import error
from reconciler.api.models import Backup
from reconciler.core.call import Call
from reconciler.core.errors import HostError
from reconciler.core.units import Seconds, stamp
from reconciler.host.store import Event
from reconciler.host.store.listing import EVENTS, Listing

T = TypeVar("T")

TURN: Final[Seconds] = 0.4
"""Between two looks at whether anything was written: a question to SQLite of some µs. The end of
the process waits for no more than this."""
HEARTBEAT: Final[Seconds] = 15.0
"""A comment at least this often, so that nobody in between takes the connection for dead."""
OVER: Final = ("completed", "failed", "cancelled")
"""Statuses after which nothing happens any more."""
MOST: Final = 64
"""Streams at a time."""


class Aside(Protocol):
    """Has work done in a thread."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


class Streams:
    """Who follows runs just now."""

    def __init__(self, listing: Listing, aside: Aside, closing: Callable[[], bool]) -> None:
        self.listing, self.aside, self.closing = listing, aside, closing
        self.open = 0

    def follow(self, look: Callable[[], Backup], call: Call, after: int) -> Response:
        """A stream about a run; `look`: how it is now; `after`: the last event that is known."""
        if self.open >= MOST:
            return error(
                503, f"{MOST} runs are being followed already; ask again", {"Retry-After": "5"}
            )
        self.open += 1  # taken now: what is told begins only later
        return EventStream(self._told(look, call, after), self._left)

    def _left(self) -> None:
        self.open -= 1

    async def _told(self, look: Callable[[], Backup], call: Call, after: int) -> AsyncIterator[str]:
        seen: object = object()
        last: dict[str, Any] = {}
        spoke = time.monotonic()
        ended = False
        while True:
            try:
                version = await self.aside(self.listing.version)
                moved = ended or version != seen
                backup = (await self.aside(look)).to_json() if moved else last
                events = partial(self.listing.events, call.vm, call.run, after)
                found = await self.aside(events) if moved else []
            except HostError as trouble:
                yield _message("end", {"error": str(trouble), "timestamp": stamp(time.time())})
                return
            for one in found:
                yield _message("log", _event(one), one.number)
                after, spoke = one.number, time.monotonic()
            seen = object() if len(found) == EVENTS else version
            if ended and len(found) < EVENTS:
                yield _message("end", backup)
                return
            ended = backup["status"] in OVER  # one more look: what is told of the end comes last
            if backup != last and not ended:
                last, spoke = backup, time.monotonic()
                yield _message("status", backup)
            if self.closing():
                return  # who follows comes again, and says which event it knows
            if time.monotonic() - spoke >= HEARTBEAT:
                spoke = time.monotonic()
                yield ": nothing new\n\n"
            await asyncio.sleep(TURN)


class EventStream(StreamingResponse):
    """Gives its place back, however it ends, also if it was never begun."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], left: Callable[[], None]) -> None:
        super().__init__(
            content,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._left = left

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def _event(one: Event) -> dict[str, Any]:
    return {
        "reason": one.reason,
        "message": one.message,
        "severity": one.severity,
        "disk": None if one.disk is None else str(one.disk),
        "count": one.count,
        "who": one.who,
        "timestamp": stamp(one.last),
    }


def _message(kind: str, data: dict[str, Any], number: int = 0) -> str:
    head = f"id: {number}\n" if number else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n"
