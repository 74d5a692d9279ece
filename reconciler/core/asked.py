"""Requests for runs as they stand in their files, and which of them nobody has begun yet.

`status` and `explain` read this, so it loads no more than they need: a file as we write it is read
by its lines (`core.requests.rendered` writes them), only one that a person has edited as YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec import Struct

from reconciler.core.ledger import Ledger
from reconciler.core.units import Seconds, stamp

_TEXT: Final = r'("(?:[^"\\]|\\.)*")'
_OURS: Final = re.compile(
    rf"(?:#.*\n)*runs:\n  - vm: {_TEXT}\n    run: {_TEXT}\n    type: {_TEXT}\n"
    rf"(?:    fallback: {_TEXT}\n)?    by: {_TEXT}\n(?:    policy: .*\n|    tags:\n|      .*\n)*"
)


class Request(Struct, frozen=True, kw_only=True):
    """A run that is asked for."""

    vm: str
    run: str
    type: str
    who: str
    """Empty: nobody has said who they are."""
    at: Seconds
    """When its file was written last."""
    file: str

    @property
    def sentence(self) -> str:
        """That it is asked for: by whom, and since when; the same at every look."""
        who = f" by {self.who}" if self.who else ""
        what = f"{self.vm}: run {self.run} ({self.type})"
        return f"{what} is asked for{who} since {stamp(self.at)}, and not begun"

    def to_json(self) -> dict[str, Any]:
        return {
            "vm": self.vm,
            "run": self.run,
            "type": self.type,
            "who": self.who or None,
            "at": stamp(self.at),
            "file": self.file,
        }


def read(text: str, file: str, at: Seconds) -> list[Request] | None:
    """The requests in a file; None: it cannot be read, which `backup --list` explains."""
    if ours := _OURS.fullmatch(text):
        vm, run, type_, _, who = (json.loads(one) if one else "" for one in ours.groups())
        return [Request(vm=vm, run=run, type=type_, who=who, at=at, file=file)]
    from reconciler.core.document import parse  # YAML takes 20 ms to load

    document, _ = parse(text, file)
    value = document.value if document else None
    entries = value.get("runs") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        return None
    return [_entry(one, file, at) for one in entries if isinstance(one, dict)]


def _entry(entry: Mapping[str, Any], file: str, at: Seconds) -> Request:
    vm, run, type_, who = (str(entry.get(key) or "") for key in ("vm", "run", "type", "by"))
    return Request(vm=vm, run=run, type=type_ or "full", who=who, at=at, file=file)


def unbegun(requests: Iterable[Request], ledger: Ledger | None) -> list[Request]:
    """Those of which nobody who makes things true has taken notice."""
    return [one for one in requests if ledger is None or not _taken(one, ledger)]


def _taken(one: Request, ledger: Ledger) -> bool:
    applied = ledger.applied.get(one.vm)
    return ledger.latest(one.vm, one.run) is not None or (
        applied is not None and applied.vm.get("run") == one.run
    )
