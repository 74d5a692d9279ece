"""Findings as text for people: each with the line that is meant, as compilers show theirs."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Final

from reconciler.cli.terminal import WIDTH, cells, paint, safe, source
from reconciler.core.errors import Diagnostic
from reconciler.core.findings import Finding, Shown, finding, in_order, lines, once, shown

EACH: Final = 20
"""Findings of one kind that are shown, unless all are asked for."""
HURT: Final = 3
"""VMs that are named where one finding hurts several."""
_GUTTER: Final = 5
"""Columns of a line's number, at least."""
_ELLIPSIS: Final = "…"
_COLOUR: Final = {"error": "red", "warning": "yellow"}


def findings(
    diagnostics: Sequence[Diagnostic],
    sources: Mapping[str, str],
    *,
    colour: bool,
    width: int = WIDTH,
    private: Collection[str] = (),
    each: int | None = EACH,
) -> list[str]:
    """Every finding, the errors last, as lines.

    `sources`: file → its text, as it was read. `private`: files that may hold what is not to be
    shown. `each`: how many of one kind are shown; None: all.
    """

    @cache
    def split(file: str) -> Sequence[str]:
        return lines(sources[file]) if file in sources else ()

    out: list[str] = []
    seen: Counter[tuple[str, str]] = Counter()
    for severity in ("warning", "error"):
        some = in_order(one for one in diagnostics if one.severity == severity)
        for diagnostic, vms in once(some):
            found = finding(diagnostic)
            seen[severity, found.rule] += 1
            if each is None or seen[severity, found.rule] <= each:
                out += _lines(found, split, colour=colour, width=width, private=private)
                if len(vms) > 1:
                    out.append(
                        f"    = of {len(vms):,} VMs: {safe(', '.join(vms[:HURT]))}{_more(vms)}"
                    )
        for (kind, rule), count in seen.items():
            if kind == severity and each is not None and count > each:
                more = f"{count - each:,} more {rule} {severity}{'s' if count > each + 1 else ''}"
                out.append(f"… and {more}: `reconciler validate --all` shows all")
    return out


def count(diagnostics: Sequence[Diagnostic]) -> str:
    """`2 errors, 1 warning`."""
    severities = [one.severity for one, _ in once(diagnostics)]
    errors = severities.count("error")
    return f"{_many(errors, 'error')}, {_many(len(severities) - errors, 'warning')}"


def _more(vms: Sequence[str]) -> str:
    return ", …" if len(vms) > HURT else ""


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _lines(
    found: Finding,
    split: Callable[[str], Sequence[str]],
    *,
    colour: bool,
    width: int,
    private: Collection[str],
) -> Iterator[str]:
    place = found.place
    severity = paint(f"{found.severity}:", _COLOUR[found.severity], colour, bold=True)
    where = paint(f"{safe(str(place))}:", None, colour, bold=True) + " " if place else ""
    yield f"{where}{severity} {paint(safe(found.summary), None, colour, bold=True)}"
    gutter = max(_GUTTER, len(str(place.line)) + 1) if place else 0
    view = None
    if place:
        view = shown(found, split(place.file), private=place.file in private)
    if place and view:
        room = max(12, width - gutter - 4)
        line, start, end = _cut(view, room)
        bar = paint("|", "blue", colour, bold=True)
        number = paint(f"{place.line:>{gutter}}", "blue", colour, bold=True)
        mark = paint("^" * max(1, end - start), _COLOUR[found.severity], colour, bold=True)
        yield f"{number} {bar} {line}".rstrip()
        yield f"{' ' * gutter} {bar} {' ' * start}{mark}"
    if found.help:
        lead = " " * gutter + " = " if place and view else "    = "
        sign = lead.replace("=", paint("=", "blue", colour, bold=True))
        for part in _wrapped(safe(found.help), max(20, width - len(lead))):
            yield sign + part
            sign = " " * len(lead)


def _wrapped(text: str, width: int) -> list[str]:
    if cells(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _cut(view: Shown, room: int) -> tuple[str, int, int]:
    """The line as a terminal shows it, not longer than there is room for, and the columns in it
    (from 0) where that which is meant begins and ends."""
    shapes = [source(char) for char in view.text]
    widths = [cells(shape) for shape in shapes]
    total = sum(widths)
    left, right = 0, len(shapes)
    if total > room:
        left, right = _window(widths, view.start, max(view.end, view.start + 1), room)
    text = "".join(shapes[left:right])
    before = 1 if left else 0
    start = before + sum(widths[left : view.start])
    end = before + sum(widths[left : min(view.end, right)])
    if left:
        text = _ELLIPSIS + text
    if right < len(shapes):
        text += _ELLIPSIS
    return text, start, max(end, start + 1)


def _window(widths: Sequence[int], start: int, end: int, room: int) -> tuple[int, int]:
    """The part of a line that is shown: what is meant from its begin, with as much around it as
    there is room for, a column each being kept for the ellipses."""
    room -= 2
    left = right = min(start, len(widths))
    used = 0
    while right < min(end, len(widths)) and used + widths[right] <= room:
        used += widths[right]
        right += 1
    grown = True
    while grown:
        grown = False
        # What is before says which key it is; what is behind is worth half of that.
        for _ in range(2):
            if left > 0 and used + widths[left - 1] <= room:
                left -= 1
                used += widths[left]
                grown = True
        if right < len(widths) and used + widths[right] <= room:
            used += widths[right]
            right += 1
            grown = True
    return left, right
