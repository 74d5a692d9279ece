"""Listening: our own socket at once, and a thread that serves it.

The socket listens before anything is loaded, so that who connects meanwhile waits and is not
refused: a client may have a question before the answer to our call is here.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from reconciler.api.about import About
from reconciler.api.gate import Gate
from reconciler.core.errors import HostError
from reconciler.core.units import Endpoint, Seconds
from reconciler.host import sockets
from reconciler.host.store.inbox import Inbox

if TYPE_CHECKING:
    import uvicorn

    from reconciler.api.connection import Crowd
    from reconciler.api.probes import Vital
    from reconciler.asking import Desk

GRACE: Final[Seconds] = 0.6
"""For answers that are on their way, at the end. Measured: an idle server ends within 0.3 s."""
LAST: Final[Seconds] = 0.3
"""After that, for the thread to let go of the rest."""


class Listener:
    """Takes callbacks at an address until it is closed."""

    def __init__(
        self,
        endpoint: Endpoint,
        inbox: Inbox,
        about: About,
        *,
        kick: Callable[[str], None],
        say: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        vital: Vital | None = None,
        given: socket.socket | None = None,
        gate: Gate | None = None,
        local: str = "",
        desk: Callable[[], Desk] | None = None,
    ) -> None:
        """Listens from now on, on a socket that was `given` or on its own.

        `ended` is told if the thread ends by itself; see `failure`. `gate`: who may come in.
        `local`: the path of a Unix socket beside the address; empty: none. `desk`: makes who is
        asked for runs, in the thread; None: callbacks are all that is taken. Raises PortBusyError
        (somebody has the address), HostError.
        """
        self.endpoint = endpoint
        self.failure: BaseException | None = None
        self._inbox, self._about = inbox, about
        self._kick, self._say, self._ended = kick, say, ended
        self._closing = threading.Event()
        self._server: uvicorn.Server | None = None
        self._end: Callable[[], object] = lambda: None
        self._vital, self._desk = vital, desk
        self.gate = gate or Gate()
        self.crowd: Crowd | None = None
        """Who is connected; None: it is not loaded yet."""
        self._socket = given or _bound(endpoint)
        try:
            self._local = sockets.Local(local, self.gate.access.group) if local else None
        except HostError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._socket.close)
                if self._local:
                    stack.callback(self._local.close)
                desk = self._desk() if self._desk else None
                if desk:
                    stack.callback(desk.close)
                self._serve(desk)
            if not self._closing.is_set():
                raise HostError("it ended by itself")
        except BaseException as failure:  # whoever waits for callbacks has to know
            self.failure = failure
            self._ended()

    def _serve(self, desk: Desk | None) -> None:
        import asyncio

        import uvicorn  # here, in the thread: the first call does not wait for it

        from reconciler.api.app import create_app
        from reconciler.api.connection import Connection, Crowd

        limits = self.gate.limits
        config = uvicorn.Config(
            create_app(
                self._inbox,
                self._about,
                self._kick,
                self._say,
                self._vital,
                self.gate,
                desk,
                self._closing.is_set,
            ),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            h11_max_incomplete_event_size=limits.headers,
            timeout_graceful_shutdown=1,
        )

        class Quiet(uvicorn.Server):
            """Ends when it is told to; uvicorn's own looks ten times a second whether it was. Our
            own connections, and TLS at the address alone."""

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                assert sockets == [listener._socket]
                await super().startup(sockets=[])
                listener.crowd = crowd = Crowd(limits.connections)
                make = partial(
                    Connection,
                    self.config,
                    self.server_state,
                    self.lifespan.state,
                    limits=limits,
                    crowd=crowd,
                )
                loop, tls = asyncio.get_running_loop(), listener.gate.tls
                patience = limits.timeout if tls else None
                self.servers.append(
                    await loop.create_server(
                        make, sock=listener._socket, ssl=tls, ssl_handshake_timeout=patience
                    )
                )
                if listener._local:
                    self.servers.append(
                        await loop.create_unix_server(make, sock=listener._local.sock)
                    )

            async def main_loop(self) -> None:
                ending = asyncio.Event()
                listener._end = partial(asyncio.get_running_loop().call_soon_threadsafe, ending.set)
                if not listener._closing.is_set():
                    await ending.wait()

        listener = self
        self._server = Quiet(config)
        if not self._closing.is_set():
            self._server.run(sockets=[self._socket])

    def check(self) -> None:
        """Raises HostError if nobody takes callbacks any more."""
        if self.failure:
            raise HostError(
                f"cannot take callbacks at {self.endpoint} any more: "
                f"{type(self.failure).__name__}: {self.failure}"
            ) from self.failure

    def close(self) -> None:
        """Answer what was asked, within a second, and let go of the address."""
        self._closing.set()
        if self._server is None:
            return  # it is only being loaded, and sees this before it begins
        self._server.should_exit = True
        with contextlib.suppress(RuntimeError):  # its loop has ended already
            self._end()
        self._thread.join(GRACE)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(LAST)


def _bound(endpoint: Endpoint) -> socket.socket:
    host = "127.0.0.1" if endpoint.host == "localhost" else endpoint.host
    return sockets.listening(host, endpoint.port, "api: {listen: …}")
