"""The HTTP API: the callbacks of the appliances' clients, and a word about our health.

The paths and fields are those of the clients in the field. A body is read leniently where we do
not use it and strictly where we do. Every error is JSON: `error`, `details`, `timestamp`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, Protocol, TypeAlias, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictFloat, StrictInt, ValidationError
from starlette.exceptions import HTTPException

from reconciler import __version__
from reconciler.api.about import HEALTH, About
from reconciler.api.answers import error, short
from reconciler.api.gate import Gate
from reconciler.api.guard import Guarded, Routes, Say, needs
from reconciler.core.access import Scope
from reconciler.core.errors import HostError
from reconciler.core.units import stamp
from reconciler.host.store.inbox import Inbox, Question, Receipt, Word

Kick: TypeAlias = Callable[[str], None]
"""Look at this VM again. It carries no news."""


class Vital(Protocol):
    """What a process says of itself, to who watches over it."""

    def alive(self) -> str:
        """Why it should be ended; empty: it moves."""
        ...

    def ready(self) -> str:
        """Why it is not ready; empty: it is."""
        ...

    def exposition(self) -> tuple[bytes, str]:
        """Its figures, and their media type."""
        ...


Number: TypeAlias = StrictInt | StrictFloat | None


def _position(value: Any) -> Any:
    """A position as a number; our own answers write it as text, so text is read too."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value


class Said(BaseModel):
    """A body; what we do not know in it is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Completion(Said):
    """One disk has arrived."""

    change_id: str
    disk_id: Annotated[StrictInt | None, BeforeValidator(_position)] = None
    bytes_transferred: Number = None


class Failure(Said):
    """What went wrong, in the client's words."""

    message: str | None = None
    code: StrictInt | str | None = None

    def __str__(self) -> str:
        known = [str(one) for one in (self.message, self.code) if one not in (None, "")]
        return f"{known[0]} ({known[1]})" if len(known) == 2 else "".join(known)


class Progress(Said):
    """How far a job is. What it says of single disks is not kept."""

    status: str | None = None
    current_phase: str | None = None
    bytes_transferred: Number = None
    total_bytes: Number = None
    transfer_speed_bps: Number = None
    progress_percent: Number = None
    error: Failure | None = None


S = TypeVar("S", bound=Said)


def _body(model: type[S]) -> Callable[[Request], Awaitable[S]]:
    """Reads a body as JSON, whatever its Content-Type says. Raises HTTPException."""

    async def read(request: Request) -> S:
        try:
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            findings = error.errors(include_url=False, include_input=False)
            broken = findings[0]["type"] == "json_invalid"
            raise HTTPException(400 if broken else 422, _sentence(findings)) from None

    return read


def _sentence(findings: Any) -> str:
    """Pydantic's findings in one line."""
    said = [
        f"{'.'.join(map(str, one['loc']))}: {one['msg']}" if one["loc"] else str(one["msg"])
        for one in findings[:5]
    ]
    return "; ".join(said)


_STATUS: Final[Mapping[Word | Question, int]] = {
    Word.NOTED: 200,
    Word.REPEATED: 200,
    Word.LATE: 200,  # it was heard, and another try would not change it
    Word.UNASKED: 409,
    Word.UNKNOWN_JOB: 404,
    Word.UNKNOWN_DISK: 404,
    Question.ANSWERED: 200,
    Question.UNKNOWN_VM: 404,
    Question.UNKNOWN_DISK: 404,
    Question.AMBIGUOUS: 409,
}


class Callbacks:
    """What the clients of the appliances ask and tell."""

    def __init__(self, inbox: Inbox, about: About, kick: Kick, say: Say) -> None:
        self.inbox, self.about, self.kick, self.say = inbox, about, kick, say

    def change_id(self, vm_name: str, disk_id: int = 0) -> JSONResponse:
        """From which change id a disk of the active run goes on."""
        answer = self.inbox.change_id(vm_name, disk_id)
        if (status := _STATUS[answer.question]) != 200:
            return error(status, answer.message)
        return JSONResponse(
            {
                "vm_name": vm_name,
                "disk_id": str(disk_id),
                "change_id": answer.change_id,
                "backup_job_id": answer.job_id,
                "message": answer.message,
            }
        )

    def complete(
        self, backup_id: str, body: Annotated[Completion, Depends(_body(Completion))]
    ) -> JSONResponse:
        """One disk of a run has arrived."""
        try:
            receipt = self.inbox.report(
                backup_id,
                body.disk_id,
                body.change_id,
                body.bytes_transferred or 0,
                time.time(),
            )
        except ValueError as wrong:
            return error(400, str(wrong))
        self.heard(receipt)
        if receipt.word is not Word.REPEATED or receipt.change_id != body.change_id.strip():
            self.say(f"callback: {receipt.message}")
        if (status := _STATUS[receipt.word]) != 200:
            return error(status, receipt.message)
        late = receipt.word is Word.LATE
        return JSONResponse(
            {
                "status": receipt.state.lower() if late else "completed",
                "backup_id": backup_id,
                "change_id": receipt.change_id,
                "message": receipt.message,
                "timestamp": stamp(time.time()),
            }
        )

    def telemetry(
        self, job_id: str, body: Annotated[Progress, Depends(_body(Progress))]
    ) -> JSONResponse:
        """How far a run is, by the word of its client, whatever type it gives the job."""
        receipt = self.inbox.telemetry(
            job_id,
            time.time(),
            status=body.status or "",
            phase=body.current_phase or "",
            size=body.bytes_transferred or 0,
            total=body.total_bytes or 0,
            speed=body.transfer_speed_bps or 0,
            percent=body.progress_percent or 0,
            error=str(body.error) if body.error else "",
        )
        self.heard(receipt)
        if (status := _STATUS[receipt.word]) != 200:
            return error(status, receipt.message)
        return JSONResponse(
            {"status": "success", "message": receipt.message, "timestamp": stamp(time.time())}
        )

    def heard(self, receipt: Receipt) -> None:
        if receipt.word is Word.NOTED:
            self.kick(receipt.vm)

    def health(self) -> JSONResponse:
        """Whether callbacks can be taken, and by whom."""
        found = {
            "hub": self.about.hub,
            "state": self.about.state,
            "state_id": "",
            "pid": self.about.pid,
            "command": self.about.command,
            "version": __version__,
            "timestamp": stamp(time.time()),
        }
        try:
            identity = self.inbox.identity()
        except HostError as trouble:
            words = {"status": "not ready", "error": short(503), "details": str(trouble)}
            return JSONResponse({**words, **found}, 503)
        return JSONResponse(
            {"status": "healthy", **found, "state_id": identity.state_id if identity else ""}
        )


class Probes:
    """Short answers for who watches over the process."""

    def __init__(self, vital: Vital) -> None:
        self.vital = vital

    def alive(self) -> Response:
        """200 as long as the loop moves."""
        return _probed(self.vital.alive())

    def ready(self) -> Response:
        """200 when every VM was looked at once, and the store can be read."""
        return _probed(self.vital.alive() or self.vital.ready())

    def metrics(self) -> Response:
        """Prometheus' text format."""
        body, kind = self.vital.exposition()
        return Response(body, media_type=None, headers={"Content-Type": kind})


def _probed(trouble: str) -> Response:
    return PlainTextResponse(f"{trouble or 'ok'}\n", 503 if trouble else 200)


def create_app(
    inbox: Inbox,
    about: About,
    kick: Kick,
    say: Say,
    vital: Vital | None = None,
    gate: Gate | None = None,
) -> Guarded:
    """The application. `kick` is told of VMs that are worth a look, `say` what a person should
    see; both from any thread. `vital`: the process, where it is one that is watched over.
    `gate`: who may come in; None: whoever is on this machine."""
    callbacks = Callbacks(inbox, about, kick, say)
    app = FastAPI(
        title="reconciler",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )

    def add(path: str, endpoint: Callable[..., Any], scope: Scope, method: str = "GET") -> None:
        app.add_api_route(path, endpoint, methods=[method], openapi_extra=needs(scope))

    add(HEALTH, callbacks.health, Scope.WATCH)
    add("/api/v1/backups/changeid", callbacks.change_id, Scope.CALLBACK)
    add("/api/v1/backups/{backup_id}/complete", callbacks.complete, Scope.CALLBACK, "POST")
    add("/api/v1/telemetry/{job_type}/{job_id}", callbacks.telemetry, Scope.CALLBACK, "POST")

    if vital:
        probes = Probes(vital)
        add("/healthz", probes.alive, Scope.WATCH)
        add("/readyz", probes.ready, Scope.WATCH)
        add("/metrics", probes.metrics, Scope.WATCH)

    async def refused(request: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, HTTPException)
        details, path = problem.detail, request.url.path
        if details == short(problem.status_code):
            details = f"nothing is at {path}"
        if problem.status_code == 405:
            details = f"{path} takes {(problem.headers or {}).get('Allow')}, not {request.method}"
        return error(problem.status_code, details, problem.headers)

    async def misread(_: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, RequestValidationError)
        return error(422, _sentence(problem.errors()))

    async def not_ready(_: Request, problem: Exception) -> JSONResponse:
        say(f"callback refused: {problem}")
        return error(503, str(problem))

    async def failed(_: Request, problem: Exception) -> JSONResponse:
        return error(500, f"this is a bug: {type(problem).__name__}; see what the hub says")

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(HostError, not_ready)
    app.add_exception_handler(Exception, failed)
    return Guarded(app, say, gate or Gate(), Routes(app))
