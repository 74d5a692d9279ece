"""The one POST to a node appliance, and the questions about it. The wire format is the field's.

Nothing here tries the POST twice, follows a redirect or takes a proxy from the environment.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from reconciler.core.appliances import Health
from reconciler.core.call import Answer, Report
from reconciler.core.errors import HostError
from reconciler.core.settings import Appliance, Secret
from reconciler.core.units import Seconds
from reconciler.host.effects import Effect, effect

if TYPE_CHECKING:
    import httpx2

MAX_BODY: Final = 65_536
"""Bytes of an answer that are read; the field's are under 1 KiB."""
ASK_TIMEOUT: Final[Seconds] = 5.0
"""Deadline of a question about a job: a witness that does not answer is not waited for."""


class NothingSent(HostError):  # noqa: N818 an outcome
    """The appliance could not be reached well enough to send it anything."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "ApplianceUnreachable")


class Line:
    """One connection to an SNA that has just answered its health check. A context manager.

    Through a tunnel a dead SNA still accepts TCP, so a connect proves nothing: the health check
    goes first, and the POST takes the same connection if it was kept alive. Raises NothingSent.
    """

    def __init__(self, sna: Appliance, token: Secret | None) -> None:
        import httpx2

        self.sna = sna
        timeout = httpx2.Timeout(sna.timeout, connect=sna.connect_timeout)
        headers = {"Authorization": f"Bearer {token.reveal()}"} if token else {}
        self.client = httpx2.Client(
            base_url=sna.url,
            timeout=timeout,
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            verify=_tls(sna.url.startswith("https")),
            limits=httpx2.Limits(max_connections=1, max_keepalive_connections=1),
        )

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()

    def preflight(self) -> None:
        """Raises NothingSent unless the SNA says that it is well; asks three times at most."""
        import httpx2

        try:
            self._health()
        except httpx2.HTTPError:
            import stamina

            stamina.instrumentation.set_on_retry_hooks([])  # what failed is said once, by us
            try:
                for attempt in stamina.retry_context(
                    on=httpx2.HTTPError, attempts=2, wait_initial=0.2, wait_max=1.0
                ):
                    with attempt:
                        self._health()
            except httpx2.HTTPError as error:
                raise NothingSent(f"GET {self.sna.url}/api/v1/health: {_said(error)}") from error

    def _health(self) -> None:
        answer = self.client.get("/api/v1/health", timeout=self._brief())
        answer.raise_for_status()

    def health(self, deadline: Seconds | None = None) -> Health:
        """What the SNA answers to one health check. Never raises for what the network does.

        `deadline`: for each step of it, the connect among them; None: the usual ones.
        """
        import httpx2

        begun = time.monotonic()
        timeout = self._brief() if deadline is None else httpx2.Timeout(deadline)
        try:
            answer = self.client.get("/api/v1/health", timeout=timeout)
        except httpx2.HTTPError as error:
            return Health(kind=_kind(error), said=_said(error))
        return Health(status=answer.status_code, took=time.monotonic() - begun)

    def _brief(self) -> httpx2.Timeout:
        import httpx2

        return httpx2.Timeout(ASK_TIMEOUT, connect=self.sna.connect_timeout)

    def start(self, request: Mapping[str, str], password: Secret) -> Answer:
        """The POST. Never raises for what the network or the SNA does: that is the answer."""
        import httpx2

        body = json.dumps({**request, "vcenter_password": password.reveal()}).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Idempotency-Key": request["job_id"],
        }
        deadline = time.monotonic() + self.sna.timeout
        status = None
        try:
            with (
                self.client.stream(
                    "POST", "/api/v1/backup/start", content=_sent(body), headers=headers
                ) as response,
                effect(Effect.ANSWER),
            ):
                status = response.status_code
                return Answer(True, status, _read(response, deadline))
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            return Answer(False, error=_said(error))
        except httpx2.HTTPError as error:
            # The status alone may be known; without the whole answer it proves nothing good.
            return Answer(True, None, error=_said(error) + (f" after {status}" if status else ""))

    def ask(self, job_id: str) -> Report:
        """What the SNA says of a job."""
        import httpx2

        try:
            answer = self.client.get(f"/api/v1/status/{job_id}", timeout=self._brief())
        except httpx2.HTTPError as error:
            return Report(None, message=_said(error))
        if answer.status_code == 404:
            return Report(False, message="it does not know the job")
        body = _json(answer)
        if answer.status_code != 200 or body is None or body.get("job_id") != job_id:
            return Report(None, message=f"it answered {answer.status_code}, not about this job")
        status = str(body.get("status", ""))
        percent = body.get("progress_percent")
        return Report(
            True,
            status,
            str(body.get("current_operation") or ""),
            float(percent) if isinstance(percent, int | float) else None,
        )


def _sent(body: bytes) -> Iterator[bytes]:
    """The body, in one piece; who asks for more of it has sent that."""
    with effect(Effect.POST):
        yield body


@cache
def _tls(used: bool) -> ssl.SSLContext:
    """Loading the machine's certificates costs 20 ms, so it is done once, and only for https."""
    return ssl.create_default_context() if used else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _read(response: httpx2.Response, deadline: float) -> str:
    import httpx2

    body = b""
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_BODY:
            body = body[:MAX_BODY]
            break
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("the answer did not end in time")
    return body.decode("utf-8", "replace")


def _json(answer: httpx2.Response) -> dict[str, Any] | None:
    try:
        value = answer.json()
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _kind(error: httpx2.HTTPError) -> str:
    """How it went wrong, as far as that tells what to do."""
    name = type(error).__name__
    causes = list(_causes(error))
    if any(isinstance(one, socket.gaierror) for one in causes):
        return "dns"
    if any(isinstance(one, ssl.SSLError) for one in causes):
        return "tls"
    if "refused" in str(error).lower():
        return "refused"
    if name in ("RemoteProtocolError", "ReadError", "WriteError"):
        return "closed"
    if name == "ConnectTimeout":
        return "connect"
    return "timeout" if name.endswith("Timeout") else "other"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _said(error: httpx2.HTTPError) -> str:
    """What went wrong, in few words and without what was sent."""
    name = type(error).__name__
    words = {
        "ConnectTimeout": "no connection in time",
        "ReadTimeout": "no answer in time",
        "WriteTimeout": "it takes no data",
        "RemoteProtocolError": "the connection was closed without a whole answer",
        "ReadError": "the connection broke",
        "WriteError": "the connection broke while sending",
    }
    if name == "HTTPStatusError":
        return f"it answers {error.response.status_code}"  # type: ignore[attr-defined]
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    return words.get(name) or (f"{text[:1].lower()}{text[1:]}" if text else name)
