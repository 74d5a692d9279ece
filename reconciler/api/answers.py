"""An error, as every path answers it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus

from fastapi.responses import JSONResponse

from reconciler.core.units import stamp


def short(status: int) -> str:
    """A status in words."""
    return HTTPStatus(status).phrase


def error(status: int, details: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error, as every path answers it."""
    body = {"error": short(status), "details": details, "timestamp": stamp(time.time())}
    return JSONResponse(body, status, dict(headers) if headers else None)
