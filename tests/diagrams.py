"""Diagrams of the docs, drawn from the tables of the code: `python -m tests.diagrams`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from reconciler.core.call import NEXT, CallState
from reconciler.core.call_plan import LOST

REFRESH: Final = "python -m tests.diagrams"
CALLS: Final = Path(__file__).resolve().parents[1] / "docs" / "calls.md"
_DRAWN: Final = re.compile(r"(?s)```mermaid\n%% from reconciler\.core\.call\.NEXT.*?```\n")


def of_calls() -> str:
    """The life of the call, an arrow for each pair of states that is in the table."""
    arrows: dict[tuple[CallState, CallState], list[str]] = {}
    for (before, event), after in NEXT.items():
        arrows.setdefault((before, after), []).append(event.value)
    lines = [f"{one} --> {two}: {', '.join(events)}" for (one, two), events in arrows.items()]
    begin = ["[*] --> DUE", f"[*] --> UNKNOWN: {LOST}"]
    lines = [*begin, *lines, *(f"{one} --> [*]" for one in CallState if one.terminal)]
    drawn = "\n".join(f"    {line}" for line in lines)
    return (
        f"```mermaid\n%% from reconciler.core.call.NEXT, by `{REFRESH}`\n"
        f"stateDiagram-v2\n{drawn}\n```\n"
    )


def refreshed(page: str) -> str:
    """A page with its diagram as it should be now."""
    found, count = _DRAWN.subn(lambda _: of_calls(), page)
    assert count == 1, f"{count} diagrams of the call in the page, not one"
    return found


if __name__ == "__main__":
    CALLS.write_text(refreshed(CALLS.read_text()))
