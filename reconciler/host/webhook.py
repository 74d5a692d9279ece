"""Post a message to whoever is to be told, signed where there is a secret."""

from __future__ import annotations

import hashlib
import hmac
import re
import ssl
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from reconciler.core.errors import HostError
from reconciler.core.notices import MEDIA_TYPE
from reconciler.core.settings import Notify, Secret
from reconciler.core.units import Seconds

if TYPE_CHECKING:
    import httpx2

SIGNATURE: Final = "X-Reconciler-Signature"
TIMESTAMP: Final = "X-Reconciler-Timestamp"
"""Seconds since the epoch; part of what is signed, so that an old message cannot be sent again."""
USELESS: Final = frozenset({400, 413, 422})
"""Answers that say that this very body will never be taken. Any other may be better later."""


class NotTakenError(HostError):
    """The message has not arrived; `useless`: and never will."""

    def __init__(self, message: str, *, useless: bool = False) -> None:
        super().__init__(message, "NoticeNotTaken")
        self.useless = useless


def signature(body: bytes, timestamp: str, secret: Secret) -> str:
    """`sha256=` and the HMAC of timestamp, a full stop and the body, in hexadecimal."""
    text = timestamp.encode() + b"." + body
    return f"sha256={hmac.new(secret.reveal().encode(), text, hashlib.sha256).hexdigest()}"


def host_of(url: str) -> str:
    """As much of the URL as may be shown: its path and query can be a way in."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def post(notify: Notify, body: str, secret: Secret | None, now: Seconds) -> None:
    """Have a message taken. Raises NotTakenError.

    No redirect is followed and no proxy of the environment used. Of the answer only the status is
    read.
    """
    import httpx2

    data, timestamp = body.encode(), str(int(now))
    headers = {"Content-Type": MEDIA_TYPE, TIMESTAMP: timestamp}
    if secret:
        headers[SIGNATURE] = signature(data, timestamp, secret)
    where = host_of(notify.url)
    try:
        with (
            httpx2.Client(
                timeout=notify.timeout,
                trust_env=False,
                follow_redirects=False,
                verify=_tls(notify.url),
            ) as client,
            client.stream("POST", notify.url, content=data, headers=headers) as answer,
        ):
            status = answer.status_code
    except httpx2.HTTPError as error:
        raise NotTakenError(f"cannot post a message to {where}: {_said(error)}") from None
    if not 200 <= status < 300:
        raise NotTakenError(
            f"cannot post a message to {where}: it answers {status}", useless=status in USELESS
        )


def _tls(url: str) -> ssl.SSLContext:
    if url.startswith("https:"):
        return ssl.create_default_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # not used, and quickly made


def _said(error: httpx2.HTTPError) -> str:
    """What went wrong, without what was sent or where to."""
    if "Timeout" in type(error).__name__:
        return "no answer in time"
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    return text if text and "://" not in text else type(error).__name__
