"""What stands before every route: who asks, whether they may, how often, and how much."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Asked

from reconciler.api.answers import error
from reconciler.api.gate import PEER, WHO, Gate
from reconciler.core.access import UNASKED, UNKNOWN, Caller, Meter, Scope, forbidden
from reconciler.core.settings import ApiLimits
from reconciler.core.units import Seconds

MAX_BODY: Final = ApiLimits().body
"""Bytes of a request's body, where the config says nothing else."""
PLACE: Final[Seconds] = 30.0
"""How long a request waits for a place before it is turned away. Longer than what a client that
starts many backups at once needs; shorter than what clients wait for an answer."""
BURST: Final = 2
"""Seconds of its rate that a client may use at once."""
DECLARED: Final = "x-scope"
"""Where a route says what it needs, in its part of the OpenAPI document."""
WATCHERS: Final = 8
"""Places of those who watch, who may hang with the storage, so that they and 32 callbacks have the
40 threads there are. Source: anyio.to_thread.current_default_thread_limiter()."""
_READING: Final = ("GET", "HEAD", "OPTIONS")

Say: TypeAlias = Callable[[str], None]
"""A line for who watches the process."""


def needs(scope: Scope) -> dict[str, Any]:
    """What a route says of itself (`openapi_extra`), so that the guard knows what it needs."""
    return {DECLARED: str(scope)}


def declared(route: object) -> Scope | None:
    """What a route needs; None: it does not say."""
    extra = getattr(route, "openapi_extra", None) or {}
    return Scope(extra[DECLARED]) if DECLARED in extra else None


class Routes:
    """What each path needs, by what the routes of an application say."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def methods(self, request: Asked) -> list[str]:
        """What may be done at a path: by every route with the pattern of the first that takes it,
        as another with a wider one is about something else."""
        routes = self.app.router.routes
        first = next((one for one in routes if one.matches(request)[0] is not Match.NONE), None)
        alike = [one for one in routes if getattr(one, "path", None) == getattr(first, "path", "")]
        return sorted({name for one in alike for name in getattr(one, "methods", None) or ()})

    def needed(self, request: Asked) -> Scope:
        """Of a path that nothing is at, as much as of one that only shows something; of a method
        that is not taken there, the most of what the others need."""
        others = []
        for route in self.app.router.routes:
            match, _ = route.matches(request)
            if match is not Match.NONE:  # one that says nothing is not for everybody
                scope = declared(route) or Scope.OPERATE
                if match is Match.FULL:
                    return scope
                others.append(scope)
        return max(others, key=_STRICT.index, default=Scope.READ)


_STRICT: Final = (Scope.WATCH, Scope.CALLBACK, Scope.READ, Scope.OPERATE)


class Guarded:
    """Lets in who may come in, and tells of what should never happen."""

    def __init__(self, app: ASGIApp, say: Say, gate: Gate, routes: Routes) -> None:
        self.app, self.say, self.gate, self.routes = app, say, gate, routes
        limits = gate.limits
        self._meters = {
            scope: Meter(rate, burst=max(1.0, BURST * rate))
            for scope in Scope
            for rate in [limits.callback_rate if scope is Scope.CALLBACK else limits.rate]
        }
        count = limits.concurrency
        self._places = {
            scope: asyncio.Semaphore(min(count, WATCHERS) if scope is Scope.WATCH else count)
            for scope in Scope
        }

    async def __call__(self, scope: Asked, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        needed = self.routes.needed(scope)
        refusal = self._admitted(scope, needed) or self._too_large(scope)
        if refusal:
            await refusal(scope, receive, send)
            return
        place = Place(self._places[needed])
        if not await place.taken():
            await _busy(scope, receive, send)
            return
        taken, most = 0, self.gate.limits.body

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, _too_large(most))
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and _endless(message):
                place.leave()  # it costs no thread, and whoever sends it counts them
            await send(message)

        try:
            await self.app(scope, limited, sent)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as problem:  # the answer, 500, is sent already
            where = f"{scope['method']} {scope['path']}"
            self.say(f"error: this is a bug: {where}: {type(problem).__name__}: {problem}")
        finally:
            place.leave()

    def _admitted(self, request: Asked, needed: Scope) -> JSONResponse | None:
        """Why somebody is not let in; None: they are."""
        access = self.gate.access
        presented = [value for name, value in request["headers"] if name == b"authorization"]
        client = request.get("client")
        by: object = ("address", client[0] if client else "")
        caller: Caller | None = None
        refusal: JSONResponse | None = None
        if (peer := request.get(PEER)) is not None:
            caller, by = access.peer(peer), ("uid", peer.uid)
        elif presented and access.keys:
            if len(presented) > 1:
                refusal = error(400, "`Authorization` stands twice: send it once")
            elif caller := access.holder(_token(presented[0])):
                by = caller.who
            else:
                refusal = error(401, UNKNOWN, _CHALLENGE)
        if wait := self._meters[needed].take(by, time.monotonic()):
            return error(
                429,
                f"this is more than {self._meters[needed].rate:g} requests a second: slow down, or "
                "set `api: {limits: …}` in the hub's config",
                {"Retry-After": str(math.ceil(wait))},
            )
        if refusal is None and caller is None:
            if access.asks(needed):
                refusal = error(401, UNASKED, _CHALLENGE)
            elif request["method"] not in _READING and _from_a_page(request):
                refusal = error(403, _PAGE)
        elif caller and not caller.may(needed):
            refusal = error(403, forbidden(caller, needed))
        if caller:
            request[WHO] = caller.who
        return refusal

    def _too_large(self, request: Asked) -> JSONResponse | None:
        length = dict(request["headers"]).get(b"content-length", b"0")
        most = self.gate.limits.body
        if length.isdigit() and int(length[:20]) > most:
            return error(413, _too_large(most))
        return None


class Place:
    """One of the places at which requests of a kind are worked on."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places, self._held = places, False

    async def taken(self) -> bool:
        """Wait for one; false: that takes too long."""
        try:
            async with asyncio.timeout(PLACE):
                await self._places.acquire()
        except TimeoutError:
            return False
        self._held = True
        return True

    def leave(self) -> None:
        """It may be called more than once."""
        if self._held:
            self._held = False
            self._places.release()


def _token(value: bytes) -> bytes:
    """What stands behind `Bearer`; empty: it is something else."""
    kind, _, token = value.strip().partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else b""


def _from_a_page(request: Asked) -> bool:
    """A browser says so of what a page has it send. Source: the Fetch standard, 3.1."""
    return any(name == b"origin" for name, _ in request["headers"])


def _endless(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )


def _too_large(most: int) -> str:
    return f"a body may have {most} bytes at most"


_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="reconciler"'}
_PAGE: Final = (
    "a page in a browser sent this, and nobody has said who they are: send a token "
    "(`api: {tokens: …}` in the hub's config), or leave `Origin` out"
)


async def _busy(scope: Asked, receive: Receive, send: Send) -> None:
    answer = error(503, "too much is asked at once; ask again", {"Retry-After": "5"})
    await answer(scope, receive, send)
