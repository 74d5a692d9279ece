"""What stands before every route: how much may be said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reconciler.api.answers import error

MAX_BODY: Final = 1 << 20
"""Bytes of a request's body. A telemetry post that names 100 disks has about 20 KiB."""

Say: TypeAlias = Callable[[str], None]
"""A line for who watches the process."""


class Guarded:
    """Keeps a body within its limit, and tells of what should never happen."""

    def __init__(self, app: ASGIApp, say: Say) -> None:
        self.app, self.say = app, say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY:
            await error(413, _TOO_LARGE)(scope, receive, send)
            return
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY:
                raise HTTPException(413, _TOO_LARGE)
            return message

        try:
            await self.app(scope, limited, send)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception as problem:  # the answer, 500, is sent already
            where = f"{scope['method']} {scope['path']}"
            self.say(f"error: this is a bug: {where}: {type(problem).__name__}: {problem}")


_TOO_LARGE: Final = f"a body may have {MAX_BODY} bytes at most"
