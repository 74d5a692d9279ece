"""The one place through which every effect on the world passes.

The adapters name what they are about to do. Nobody listens, except a test that stops the process
dead before or after an effect and then looks whether the next one makes it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TypeAlias


class Effect(StrEnum):
    """What a process leaves behind in the world; a crash may come before or after each."""

    LEASE = "lease committed"
    CLAIM = "claim made"
    BIND = "port bound"
    IMAGE = "image created"
    SPAWN = "server spawned"
    HANDSHAKE = "handshake done"
    STARTED = "start noted"
    INTENT = "intent committed"
    MARKER = "intent marked in the repository"
    POST = "POST begun"
    ANSWER = "POST answered"
    OUTCOME = "answer committed"
    TAINT = "taint committed"
    REPORT = "report committed"
    FLUSH = "disks flushed"
    PUBLISH = "run published"
    VERDICT = "verdict committed"
    STOP = "server stopped"
    RELEASE = "lease released"
    FORGET = "removal of a backup committed"
    UNLINK = "image removed"
    DIAL = "ssh started"
    HANG_UP = "ssh ended"
    UNMARK = "intent taken back in the repository"


class Side(StrEnum):
    """When, seen from the effect."""

    BEFORE = "before"
    AFTER = "after"


Hook: TypeAlias = Callable[[Effect, Side], None]
hook: Hook | None = None
"""Told of every effect, in the thread that has it. None, except in a test."""


@contextmanager
def effect(what: Effect) -> Iterator[None]:
    """Around an effect. One that fails has no after."""
    if hook:
        hook(what, Side.BEFORE)
    yield
    if hook:
        hook(what, Side.AFTER)
