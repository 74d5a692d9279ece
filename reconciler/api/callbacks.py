"""The callbacks of the appliances' clients, and a word about our health.

A body is read leniently where we do not use it and strictly where we do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Final, TypeAlias

from fastapi import Depends
from fastapi.responses import JSONResponse

from reconciler import __version__
from reconciler.api.about import About
from reconciler.api.answers import error, short
from reconciler.api.bodies import body
from reconciler.api.guard import Say
from reconciler.api.models import Completion, Progress
from reconciler.core.errors import HostError
from reconciler.core.units import stamp
from reconciler.host.store.inbox import Inbox, Question, Receipt, Word

Kick: TypeAlias = Callable[[str], None]
"""Look at this VM again. It carries no news."""

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
        self, backup_id: str, said: Annotated[Completion, Depends(body(Completion))]
    ) -> JSONResponse:
        """One disk of a run has arrived."""
        try:
            receipt = self.inbox.report(
                backup_id,
                said.disk_id,
                said.change_id,
                said.bytes_transferred or 0,
                time.time(),
            )
        except ValueError as wrong:
            return error(400, str(wrong))
        self.heard(receipt)
        if receipt.word is not Word.REPEATED or receipt.change_id != said.change_id.strip():
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
        self, job_type: str, job_id: str, said: Annotated[Progress, Depends(body(Progress))]
    ) -> JSONResponse:
        """How far a run is, by the word of its client, whatever type it gives the job."""
        del job_type  # a part of the path, and no more
        receipt = self.inbox.telemetry(
            job_id,
            time.time(),
            status=said.status or "",
            phase=said.current_phase or "",
            size=said.bytes_transferred or 0,
            total=said.total_bytes or 0,
            speed=said.transfer_speed_bps or 0,
            percent=said.progress_percent or 0,
            error=str(said.error) if said.error else "",
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
