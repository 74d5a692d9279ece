"""The ways in which the appliance misbehaves when it is told to."""

from __future__ import annotations

from enum import Enum
from http import HTTPStatus
from typing import Final


class Mode(Enum):
    """A way to misbehave: its name in an order, and what it does."""

    NONE = ("none", "behave")
    REFUSE = ("refuse", "answer a start with 400; nothing started")
    FORBIDDEN = ("forbidden", "answer a start with 403; nothing started")
    CONFLICT = ("conflict", "answer a start with 409; nothing started")
    REDIRECT = ("redirect", "answer a start with 307 to /elsewhere (a 404); nothing started")
    ERROR_BEFORE = ("error-before", "answer a start with 500; nothing started")
    ERROR_AFTER = ("error-after", "start the job, then answer 500")
    HANG_BEFORE = ("hang-before", "read a start and never answer; nothing started")
    HANG_AFTER = ("hang-after", "start the job and never answer")
    DROP_BEFORE = ("drop-before", "read a start, close the connection; nothing started")
    DROP_AFTER = ("drop-after", "start the job, then close the connection unanswered")
    ANSWER_TWICE = ("answer-twice", "start the job once and put the same 200 on the wire twice")
    STRANGER = ("stranger", "answer a start with a 200 naming another job_id; nothing started")
    FORGET = ("forget", "forget every job at once, and each new one at birth; copies go on")
    DIE = ("die", "accept the start, then kill its copies half-way: it fails")
    CRASH = ("crash", "accept the start, then die half-way, copies and all, as by kill -9")
    ONE_DISK = ("one-disk", "report the first disk alone as complete, and never the others")
    REPEAT = ("repeat", "report each disk as complete three times")
    LATE = ("late", "hold back what the jobs have to report until another order")
    TORN = ("torn", "snapshot the disks of a live VM one by one, not together")
    UNHEALTHY = ("unhealthy", "answer health with 503")
    SICKENS = ("sickens", "answer one health check well, and from then on with 503")
    CLOSE_ALL = ("close-all", "close every connection, like a tunnel with nothing behind it")

    def __str__(self) -> str:
        return self.value[0]


MODES: Final = {str(mode): mode for mode in Mode}
ON_START: Final = frozenset(Mode) - {Mode.NONE, Mode.UNHEALTHY, Mode.SICKENS, Mode.CLOSE_ALL}
REFUSALS: Final = {
    Mode.REFUSE: HTTPStatus.BAD_REQUEST,
    Mode.FORBIDDEN: HTTPStatus.FORBIDDEN,
    Mode.CONFLICT: HTTPStatus.CONFLICT,
    Mode.REDIRECT: HTTPStatus.TEMPORARY_REDIRECT,
    Mode.ERROR_BEFORE: HTTPStatus.INTERNAL_SERVER_ERROR,
}
