"""The one POST to a node appliance, and the questions about it. The wire format is the field's.

Nothing here tries the POST twice, follows a redirect or takes a proxy from the environment. The
library is http.client, the standard one: `docs/adr/0032-the-line-is-http-client.md` says why.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import time
from collections.abc import Mapping
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from reconciler.core.appliances import Health
from reconciler.core.call import Answer, Report
from reconciler.core.errors import HostError
from reconciler.core.settings import Appliance, Secret
from reconciler.core.units import Seconds
from reconciler.host.effects import Effect, effect

if TYPE_CHECKING:
    import ssl

MAX_BODY: Final = 65_536
"""Bytes of an answer that are read; the field's are under 1 KiB."""
ASK_TIMEOUT: Final[Seconds] = 5.0
"""Deadline of a question about a job: a witness that does not answer is not waited for."""
SLOW: Final = "no answer in time"
BROKE: Final = "the connection broke"
CUT: Final = "the connection was closed without a whole answer"


class NothingSent(HostError):  # noqa: N818 an outcome
    """The appliance could not be reached well enough to send it anything."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "ApplianceUnreachable")


class _Trouble(Exception):  # noqa: N818 never leaves this module
    """What the network or the SNA did instead of answering."""

    def __init__(self, kind: str, said: str, *, connected: bool = True) -> None:
        super().__init__(said)
        self.kind, self.said = kind, said
        """How it went wrong, as far as that tells what to do; and in few words."""
        self.connected = connected
        """There was a connection, so something may have been sent."""


class Line:
    """One connection to an SNA that has just answered its health check. A context manager.

    Through a tunnel a dead SNA still accepts TCP, so a connect proves nothing: the health check
    goes first, and the POST takes the same connection if it was kept alive. Raises NothingSent.
    """

    def __init__(self, sna: Appliance, token: Secret | None) -> None:
        self.sna = sna
        self.headers = {"Accept": "*/*", "User-Agent": "nbd-reconciler"}
        if token:
            self.headers["Authorization"] = f"Bearer {token.reveal()}"
        url = urlsplit(sna.url)
        self._base = url.path.rstrip("/")
        host = url.hostname or ""  # the port is always given: else it is looked for in an IPv6 host
        self._http = http.client.HTTPConnection(host, url.port or 80)
        if url.scheme == "https":
            self._http = http.client.HTTPSConnection(host, url.port or 443, context=_tls())
        # A connection is made by us alone: http.client would make another one in silence.
        self._http.auto_open = 0

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def preflight(self) -> None:
        """Raises NothingSent unless the SNA says that it is well; asks three times at most."""
        try:
            self._well()
        except _Trouble:
            import stamina

            stamina.instrumentation.set_on_retry_hooks([])  # what failed is said once, by us
            try:
                for attempt in stamina.retry_context(
                    on=_Trouble, attempts=2, wait_initial=0.2, wait_max=1.0
                ):
                    with attempt:
                        self._well()
            except _Trouble as error:
                raise NothingSent(f"GET {self.sna.url}/api/v1/health: {error.said}") from error

    def _well(self) -> None:
        status, _ = self._get("/api/v1/health")
        if not 200 <= status < 300:
            raise _Trouble("status", f"it answers {status}")

    def health(self, deadline: Seconds | None = None) -> Health:
        """What the SNA answers to one health check. Never raises for what the network does.

        `deadline`: for each step of it, the connect among them; None: the usual ones.
        """
        begun = time.monotonic()
        try:
            status, _ = self._get("/api/v1/health", deadline)
        except _Trouble as error:
            return Health(kind=error.kind, said=error.said)
        return Health(status=status, took=time.monotonic() - begun)

    def start(self, request: Mapping[str, str], password: Secret) -> Answer:
        """The POST. Never raises for what the network or the SNA does: that is the answer."""
        body = json.dumps({**request, "vcenter_password": password.reveal()}).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Idempotency-Key": request["job_id"],
        }
        deadline = time.monotonic() + self.sna.timeout
        status = None
        try:
            self._connected(self.sna.connect_timeout, self.sna.timeout)
            self._send("POST", "/api/v1/backup/start", headers, body)
            response = self._response()
            with effect(Effect.ANSWER):
                status = response.status
                return Answer(True, status, _text(self._read(response, deadline)))
        except _Trouble as error:
            if not error.connected:
                return Answer(False, error=error.said)
            # The status alone may be known; without the whole answer it proves nothing good.
            return Answer(True, None, error=error.said + (f" after {status}" if status else ""))

    def ask(self, job_id: str) -> Report:
        """What the SNA says of a job."""
        try:
            code, text = self._get(f"/api/v1/status/{job_id}")
        except _Trouble as error:
            return Report(None, message=error.said)
        if code == 404:
            return Report(False, message="it does not know the job")
        body = _json(text)
        if code != 200 or body is None or body.get("job_id") != job_id:
            return Report(None, message=f"it answered {code}, not about this job")
        status = str(body.get("status", ""))
        percent = body.get("progress_percent")
        return Report(
            True,
            status,
            str(body.get("current_operation") or ""),
            float(percent) if isinstance(percent, int | float) else None,
        )

    # -- one request and its answer

    def _get(self, path: str, deadline: Seconds | None = None) -> tuple[int, bytes]:
        """Status and body. `deadline`: of each step. Raises _Trouble."""
        connect = self.sna.connect_timeout if deadline is None else deadline
        patience = ASK_TIMEOUT if deadline is None else deadline
        self._connected(connect, patience)
        self._send("GET", path, {}, None)
        response = self._response()
        return response.status, self._read(response, time.monotonic() + patience)

    def _connected(self, connect: Seconds, patience: Seconds) -> None:
        """See to a connection, the one that was kept alive if there is one. Raises _Trouble.

        `patience`: how long whatever is sent or awaited on it may take.
        """
        if self._http.sock and _over(self._http.sock):
            self._http.close()
        if self._http.sock is None:
            self._http.timeout = connect
            try:
                self._http.connect()
            except (OSError, ValueError) as error:  # a host name that is none is a ValueError
                self._http.close()
                raise _unconnected(error) from error
        assert self._http.sock
        self._http.sock.settimeout(patience)

    def _send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> None:
        line = self._http
        line.putrequest(method, self._base + path, skip_accept_encoding=True)
        try:
            for name, value in {**self.headers, **headers}.items():
                line.putheader(name, value)
        except ValueError:  # it shows the value, and that may be the token
            line.close()
            raise _Trouble(
                "other", "its token has a character that no header may have", connected=False
            ) from None
        try:
            if body is None:
                line.endheaders()
            else:
                with effect(Effect.POST):
                    line.endheaders(body)
        except TimeoutError as error:
            line.close()
            raise _Trouble("timeout", "it takes no data") from error
        except OSError as error:
            line.close()
            raise _Trouble("closed", f"{BROKE} while sending") from error

    def _response(self) -> http.client.HTTPResponse:
        """The answer up to its body. Raises _Trouble."""
        try:
            return self._http.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise _cut(error) from error

    def _read(self, response: http.client.HTTPResponse, deadline: Seconds) -> bytes:
        """The body, MAX_BODY of it at most. Raises _Trouble."""
        body = b""
        try:
            while len(body) < MAX_BODY and (piece := response.read1(MAX_BODY - len(body))):
                body += piece
                if time.monotonic() > deadline:
                    raise TimeoutError("the answer did not end in time")
            if response.length and len(body) < MAX_BODY:  # that much was announced and did not come
                raise http.client.IncompleteRead(body, response.length)
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            raise _cut(error) from error
        if response.length == 0:
            response.read(0)  # which is how http.client notes that nothing more is to come
        if not response.isclosed():  # what is left of it would be taken for the next answer
            self._http.close()
        return body


@cache
def _tls() -> ssl.SSLContext:
    """Loading the machine's certificates costs 20 ms, so it is done once, and only for https."""
    import ssl

    return ssl.create_default_context()


def _over(sock: socket.socket) -> bool:
    """Whether a connection that rests was closed by the other side, or has what nobody asked for:
    either way, nothing more is sent on it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _unconnected(error: OSError | ValueError) -> _Trouble:
    """Why there is no connection."""
    if isinstance(error, TimeoutError):
        return _Trouble("connect", "no connection in time", connected=False)
    if isinstance(error, ConnectionRefusedError):
        return _Trouble("refused", "connection refused", connected=False)
    kind = "other"
    if isinstance(error, socket.gaierror):
        kind = "dns"
    elif type(error).__module__ == "ssl":  # which is loaded only where it is used
        kind = "tls"
    return _Trouble(kind, _words(error), connected=False)


def _cut(error: Exception) -> _Trouble:
    """Why there is no whole answer."""
    if isinstance(error, TimeoutError):
        return _Trouble("timeout", SLOW)
    if isinstance(error, http.client.HTTPException):
        return _Trouble("closed", CUT)
    return _Trouble("closed", BROKE)


def _words(error: Exception) -> str:
    """What went wrong, in few words and without what was sent."""
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or (
        os.strerror(number) if number and number > 0 else str(error)
    )
    return f"{text[:1].lower()}{text[1:]}" if text else type(error).__name__


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _json(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
