"""One connection, bounded in time: uvicorn's own waits for a slow client for ever."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import sys
import time
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from reconciler.api.gate import PEER, peer_of
from reconciler.core.settings import ApiLimits
from reconciler.core.units import stamp


class Crowd:
    """The open connections; who has asked nothing for longest comes first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, one: Connection) -> bool:
        """Whether there is room; whoever rests has to make some."""
        if len(self._open) >= self.most:
            resting = next((other for other in self._open if other.resting), None)
            if resting is None:
                return False
            self.leave(resting)
            resting.transport.abort()
        self._open[one] = None
        return True

    def moved(self, one: Connection) -> None:
        """It has asked something just now."""
        if one in self._open:
            del self._open[one]
            self._open[one] = None

    def leave(self, one: Connection) -> None:
        self._open.pop(one, None)


class Connection(H11Protocol):
    """One client, who has to finish what it begins."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        limits: ApiLimits,
        crowd: Crowd,
    ) -> None:
        super().__init__(config, server_state, app_state, None)
        self.timeout_keep_alive = math.ceil(limits.idle)
        self._limits, self._crowd = limits, crowd
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    @property
    def _last(self) -> RequestResponseCycle | None:
        """The last request that came here, with its answer; None: none did."""
        return cast("RequestResponseCycle | None", self.cycle)  # uvicorn says that it always is

    @property
    def resting(self) -> bool:
        """Nothing that was asked is being answered."""
        return self._last is None or self._last.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            self._introduce(sock)
        if not self._crowd.enter(self):
            self._answer(503, "too many are connected at once; ask again", retry=5)
            return
        self._wait()

    def _introduce(self, sock: socket.socket) -> None:
        """Every request says who is at the other end."""
        app, peer = self.app, peer_of(sock)

        async def introduced(scope: Any, receive: Any, send: Any) -> None:
            scope[PEER] = peer
            await app(scope, receive, send)

        self.app = introduced

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        for timer in (self._arrival, self._stall):
            if timer:
                timer.cancel()
        self._arrival = self._stall = None
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._crowd.moved(self)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._hurry()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._hurry()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall and not self.transport.is_closing():
            self._stall.cancel()
            self._stall = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._hurry()

    def _hurry(self) -> None:
        """Who does not take an answer in time is let go, with what waits for them."""
        if self._stall is None:
            self._stall = self.loop.call_later(self._limits.timeout, self.transport.abort)

    def _wait(self) -> None:
        """What has begun to arrive has to be here in time, however it trickles."""
        if self.transport.is_closing():
            arriving = False
        elif self.conn.their_state is h11.IDLE:
            arriving = self._last is None or bool(self.conn.trailing_data[0])
        else:
            arriving = self.conn.their_state is h11.SEND_BODY
        if arriving and self._arrival is None:
            self._arrival = self.loop.call_later(self._limits.timeout, self._late)
        elif self._arrival and not arriving:
            self._arrival.cancel()
            self._arrival = None

    def _late(self) -> None:
        self._arrival = None
        if self.transport.is_closing():
            return
        seconds = self._limits.timeout
        self._answer(408, f"the request did not arrive whole within {seconds:g} s")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """What is no HTTP, in the words of the other errors; `msg` is always the same."""
        problem = sys.exc_info()[1]
        if getattr(problem, "error_status_hint", 400) == 431:
            most = self._limits.headers
            self._answer(431, f"path, query and headers may have {most} bytes at most together")
        else:
            self._answer(400, "this is no request of HTTP/1.1")

    def _answer(self, status: int, details: str, retry: int = 0) -> None:
        """Say a last word, past the application."""
        if self._last and not self._last.response_complete:
            self._last.disconnected = True
            self._last.message_event.set()
        words = {
            "error": HTTPStatus(status).phrase,
            "details": details,
            "timestamp": stamp(time.time()),
        }
        body = json.dumps(words).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *([(b"retry-after", str(retry).encode())] if retry else []),
        ]
        reason = HTTPStatus(status).phrase.encode()
        response = h11.Response(status_code=status, headers=headers, reason=reason)
        try:
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer is on its way already
            self.transport.abort()
            return
        self.transport.close()
        self._hurry()
