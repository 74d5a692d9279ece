"""The daemon's log: text for a terminal, JSON lines for all else, with journald's priorities.

A line is a constant message and its fields; `reconcile_id`, `vm`, `disk`, `run` and `revision` are
on each line that they are about.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final, TextIO

import structlog

from reconciler.core.settings import Secret
from reconciler.execute import Step

_PRIORITIES: Final = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Level → priority. Source: sd-daemon(3)."""


def configure(stream: TextIO, environment: Mapping[str, str] = os.environ) -> None:
    """Log to a stream from now on."""
    terminal = stream.isatty()
    journal = _is_journal(stream, environment)
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _hidden,
    ]
    if terminal:
        processors.append(structlog.dev.ConsoleRenderer(0))
    else:
        processors.append(structlog.processors.EventRenamer("message"))
        processors.append(structlog.processors.JSONRenderer(default=str))
        if journal:
            processors.insert(-1, _noted_level)
            processors.append(_with_priority)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )


def _is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether a stream is the journal's. Source: systemd.exec(5), JOURNAL_STREAM."""
    named = environment.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


def _hidden(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A secret is never written, whoever hands one over."""
    for key, value in event.items():
        if isinstance(value, Secret):
            event[key] = str(value)
    return event


def _noted_level(
    _logger: Any, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    event["priority"] = _PRIORITIES.get(str(event.get("level")), 6)
    return event


def _with_priority(_logger: Any, name: str, line: str) -> str:
    return f"<{_PRIORITIES.get(name, 6)}>{line}"


def log(message: str, *, level: str = "info", **fields: Any) -> None:
    """One line. Fields that are empty are left out.

    A pipe that nobody reads any more, or a full disk below the log, stops no backup.
    """
    said = {key: value for key, value in fields.items() if value not in (None, "")}
    with suppress(OSError):
        getattr(structlog.get_logger(), level)(message, **said)


def bind(**fields: Any) -> None:
    """What is on every line of this thread from now on, in the place of what was."""
    structlog.contextvars.clear_contextvars()
    said = {key: value for key, value in fields.items() if value not in (None, "")}
    structlog.contextvars.bind_contextvars(**said)


def log_step(step: Step, **about: str) -> None:
    """What an action came to. `about`: what more the line says, if another thread writes it."""
    action = step.action
    log(
        step.reason,
        level="info" if step.ok else "warning",
        vm=action.vm,
        disk=None if action.disk is None else str(action.disk),
        run=_run_of(step),
        action=action.kind,
        cause=action.cause,
        detail=step.message,
        seconds=round(step.took, 4) or None,
        **about,
    )


def _run_of(step: Step) -> str | None:
    """The run that an action is about, by whatever it has of one."""
    if step.call:
        return step.call.run
    parts = (getattr(step.action, name, None) for name in ("export", "lease", "call", "target"))
    return next((run for part in parts if (run := getattr(part, "run", ""))), None)


def to_stderr() -> None:
    """The daemon's own stream."""
    configure(sys.stderr)
