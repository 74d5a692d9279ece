"""The HTTP API as a whole: every route, what it needs, and what it says when it cannot.

The paths and fields are those of the clients in the field. Every error is JSON: `error`,
`details`, `timestamp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from reconciler import __version__
from reconciler.api import backups as backup_api
from reconciler.api.about import HEALTH, About
from reconciler.api.answers import error, short
from reconciler.api.backups import BackupApi
from reconciler.api.bodies import documented, sentence
from reconciler.api.callbacks import Callbacks, Kick
from reconciler.api.gate import Gate
from reconciler.api.guard import Guarded, Routes, Say, needs
from reconciler.api.models import (
    Backup,
    Backups,
    Chain,
    ChangeId,
    Completed,
    Completion,
    Error,
    Health,
    Heard,
    Progress,
    Start,
    Stats,
)
from reconciler.api.probes import Probes, Vital
from reconciler.api.streams import EventStream
from reconciler.asking import Desk, RefusedError
from reconciler.core.access import Scope
from reconciler.core.errors import ReconcilerError
from reconciler.host.store.inbox import Inbox

OPENAPI: Final = "/openapi.json"
BACKUPS: Final = "/api/v1/backups"
_ABOUT: Final = (
    "Backups of whole VMs: what schedulers ask of a hub, and what the clients of its node "
    "appliances tell it. One request is one snapshot of all disks of a VM."
)
_ERRORS: Final = {
    400: "It cannot be meant: no JSON, an unknown repository, or a VM whose spec is refused.",
    401: "A token is needed, and none that is known was sent.",
    403: "This token may not do that.",
    404: "There is no such VM, backup, job or disk.",
    409: "Something that has not ended stands in the way; `Location` names it.",
    413: "The body is too large.",
    422: "A field is missing, or of another shape.",
    429: "Too many requests; `Retry-After` says when to ask again.",
    500: "A bug; the hub's process says more.",
    503: "Not ready: trying again may help.",
}


_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
"""Named here and not by its model: a route that answers with text has errors in JSON all the same.
"""


class _Routes:
    """Takes the routes of an application, each with all that is said of it, in one place."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def add(
        self,
        path: str,
        endpoint: Callable[..., Any],
        scope: Scope,
        method: str = "GET",
        *,
        answer: type[BaseModel] | None = None,
        status: int = 200,
        asked: type[BaseModel] | None = None,
        more: Mapping[int | str, dict[str, Any]] | None = None,
        tag: str = "backups",
        kind: type[Response] = JSONResponse,
    ) -> None:
        """`scope`: what who asks needs. `answer`: the shape of a good one, which is of that `kind`.
        `asked`: the body's. `more`: other answers than those."""
        watch = scope is Scope.WATCH
        known = _ERRORS if not watch else {status: _ERRORS[status] for status in (401, 429, 500)}
        responses: dict[int | str, dict[str, Any]] = {
            number: {"description": said, "content": _ERROR} for number, said in known.items()
        }
        if answer:
            responses[status] = {"model": answer}
        self.app.add_api_route(
            path,
            endpoint,
            methods=[method],
            status_code=status,
            response_class=kind,
            responses={**responses, **(more or {})},
            tags=[tag],
            operation_id=endpoint.__name__,
            openapi_extra={
                **needs(scope),
                **(documented(asked) if asked else {}),
                **({} if watch else {"security": [{"token": []}, {}]}),
            },
        )


def create_app(
    inbox: Inbox,
    about: About,
    kick: Kick,
    say: Say,
    vital: Vital | None = None,
    gate: Gate | None = None,
    desk: Desk | None = None,
    closing: Callable[[], bool] = lambda: False,
) -> Guarded:
    """The application. `kick` is told of VMs that are worth a look, `say` what a person should
    see; both from any thread. `vital`: the process, where it is one that is watched over.
    `gate`: who may come in; None: whoever is on this machine. `desk`: who is asked for runs; None:
    nobody, there are callbacks alone. `closing`: whether the process is about to end."""
    app = FastAPI(
        title="reconciler",
        description=_ABOUT,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    add = _Routes(app).add
    callbacks = Callbacks(inbox, about, kick, say)
    tag = "callbacks"
    add(
        f"{BACKUPS}/changeid", callbacks.change_id, Scope.CALLBACK, answer=ChangeId, tag=tag
    )  # before what takes any word in its place
    if desk:
        _add_backups(add, BackupApi(desk, closing))
    add(
        f"{BACKUPS}/{{backup_id}}/complete",
        callbacks.complete,
        Scope.CALLBACK,
        "POST",
        answer=Completed,
        asked=Completion,
        tag=tag,
    )
    add(
        "/api/v1/telemetry/{job_type}/{job_id}",
        callbacks.telemetry,
        Scope.CALLBACK,
        "POST",
        answer=Heard,
        asked=Progress,
        tag=tag,
    )
    tag = "health"
    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"model": Health, "description": "The store cannot be used."}
    }
    add(HEALTH, callbacks.health, Scope.WATCH, answer=Health, more=not_ready, tag=tag)
    if vital:
        probes = Probes(vital)
        text: dict[int | str, dict[str, Any]] = {
            503: {"content": {"text/plain": {}}, "description": "It should be looked after."}
        }
        plain = PlainTextResponse
        add("/healthz", probes.alive, Scope.WATCH, kind=plain, more=text, tag=tag)
        add("/readyz", probes.ready, Scope.WATCH, kind=plain, more=text, tag=tag)
        add("/metrics", probes.metrics, Scope.WATCH, kind=plain, tag=tag)
    _describe(app)
    routes = Routes(app)
    _say_errors(app, say, routes)
    return Guarded(app, say, gate or Gate(), routes)


def _add_backups(add: Callable[..., None], api: BackupApi) -> None:
    read, operate = Scope.READ, Scope.OPERATE
    here: dict[int | str, dict[str, Any]] = {
        201: {
            "model": Backup,
            "description": "Every disk is served.",
            "headers": _LOCATION,
        },
        202: {
            "model": Backup,
            "description": "It is asked for, and not every disk is served yet; look at `Location`.",
            "headers": _LOCATION,
        },
    }
    stream: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "Server-sent events: `log`, `status`, `end`.",
            "content": {"text/event-stream": {"schema": _EVENT}},
        }
    }
    add(BACKUPS, api.start, operate, "POST", answer=Backup, asked=Start, status=201, more=here)
    add(BACKUPS, api.page, read, answer=Backups)
    add(f"{BACKUPS}/stats", api.stats, read, answer=Stats)
    add(f"{BACKUPS}/{{backup_id}}", api.one, read, answer=Backup)
    add(f"{BACKUPS}/{{backup_id}}", api.cancel, operate, "DELETE", answer=Backup)
    add(f"{BACKUPS}/{{backup_id}}/events", api.events, read, kind=EventStream, more=stream)
    add(f"{BACKUPS}/{{vm_name}}/chain", api.chain, read, answer=Chain)


_EVENT: Final = {
    "type": "object",
    "description": "One event of the stream; `data` is JSON.",
    "properties": {
        "id": {"type": "string", "description": "Of a `log`: the number to go on from."},
        "event": {"type": "string", "enum": ["log", "status", "end"]},
        "data": {"type": "string"},
    },
    "required": ["event", "data"],
}
_LOCATION: Final = {
    "Location": {"description": "Where to look at it.", "schema": {"type": "string"}}
}


def _describe(app: FastAPI) -> None:
    """The OpenAPI document, for people and programs."""

    @cache
    def document() -> dict[str, Any]:
        found = app.openapi()
        found["components"]["schemas"]["Error"] = Error.model_json_schema()
        found["components"]["securitySchemes"] = {
            "token": {
                "type": "http",
                "scheme": "bearer",
                "description": "Needed where the hub's config has tokens: see docs/api.md.",
            }
        }
        return found

    def openapi() -> JSONResponse:
        return JSONResponse(document())

    app.add_api_route(OPENAPI, openapi, include_in_schema=False, openapi_extra=needs(Scope.READ))


def _say_errors(app: FastAPI, say: Say, routes: Routes) -> None:
    async def refused(request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, HTTPException)
        details, path = problem.detail, request.url.path
        if details == short(problem.status_code):
            details = f"nothing is at {path}"
        headers = problem.headers
        if problem.status_code == 405:
            headers = {"Allow": ", ".join(routes.methods(request.scope))}
            details = f"{path} takes {headers['Allow']}, not {request.method}"
        return error(problem.status_code, details, headers)

    async def misread(_: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestValidationError)
        return error(422, sentence(problem.errors()))

    async def not_ready(request: Request, problem: Exception) -> JSONResponse:
        what = "callback" if request.url.path.endswith(("complete", "changeid")) else "request"
        what = "callback" if "/telemetry/" in request.url.path else what
        say(f"{what} refused: {problem}")
        return error(503, str(problem))

    async def failed(_: Request, problem: Exception) -> JSONResponse:
        return error(500, f"this is a bug: {type(problem).__name__}; see what the hub says")

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(RefusedError, backup_api.refused)
    app.add_exception_handler(ReconcilerError, not_ready)
    app.add_exception_handler(Exception, failed)
