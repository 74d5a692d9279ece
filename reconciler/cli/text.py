"""Plans, status and findings as text for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from reconciler.cli.findings import EACH as EACH
from reconciler.cli.findings import count as count
from reconciler.cli.findings import findings as findings
from reconciler.cli.tables import MOST, SYMBOL, foreign_notes, header, paint, some
from reconciler.cli.terminal import WIDTH, cells, padded, width_of
from reconciler.core.actions import Action, Create, Notify, Start
from reconciler.core.plan import Plan
from reconciler.core.vm_plan import VmPlan

_COLOUR: Final = {
    "+": "green",
    "=": "green",
    "-/+": "yellow",
    "~": "yellow",
    "!": "yellow",
    "-": "red",
    "x": "red",
    ">": "cyan",
}
NARROW: Final = 60
"""Columns below which what is said stands below its subject, and not beside it."""
_DONE: Final = {
    "create": "to create",
    "start": "to start",
    "adopt": "to adopt",
    "restart": "to restart",
    "stop": "to stop",
    "release": "to release",
    "call": "call",
    "wait": "waiting",
    "hold": "held",
    "refuse": "refused",
}


def plan_text(
    plan: Plan,
    *,
    colour: bool = False,
    width: int | None = None,
    sources: Mapping[str, str] | None = None,
    diff: bool = False,
) -> str:
    """The plan as a person reads it. `sources`: file → the text that a finding may be about.
    `diff`: with before and after of command lines and images."""
    if width is None:
        width = width_of(sys.stdout)
    blocks = [
        "\n".join(_vm(one, colour, width, plan if diff else None))
        for one in plan.vms
        if one.actions
    ]
    if any(one.actions for one in plan.tunnels):
        from reconciler.cli import tunnels

        blocks += [
            "\n".join(_block(tunnels.header(one), tunnels.plan_rows(one), colour, width))
            for one in plan.tunnels
            if one.actions
        ]
    lines = findings(plan.diagnostics, sources or {}, colour=colour, width=width)
    notes = foreign_notes(plan)
    named = {(one.pid, port) for one in plan.foreign for port in one.ports}
    notes += [
        f"not ours: {one} is in the port range; skipped"
        for one in plan.strangers[: MOST * 4]
        if (one.pid, one.port) not in named
    ]
    wrong = {one.vm for one in plan.diagnostics if one.severity == "error"}
    for why, names in (
        ("what is written of it has an error", wrong.intersection(plan.untouched)),
        ("this is about others", set(plan.untouched) - wrong),
    ):
        if names:
            told = [name for name in plan.untouched if name in names]
            notes.append(f"untouched, as {why}: {some(told)}")
    quiet = [one for one in plan.vms if not one.actions]
    parts = ["\n".join(lines)] if lines else []
    parts += blocks
    notes += [f"{one.name}: {one.lost_run}" for one in plan.vms if one.lost_run]
    notes += standing(plan)
    quiet = [one for one in quiet if not one.lost_run]
    if quiet and blocks:
        also = f"{len(quiet)} other VM{'s are' if len(quiet) > 1 else ' is'}"
        notes.append(f"{also} as declared")
    notes.append("")
    notes.append(total(plan))
    if width < WIDTH:  # a terminal would break them anywhere
        notes = ["\n    ".join(_wrapped(one, width - 4)) for one in notes]
    parts.append("\n".join(notes).lstrip("\n"))
    return "\n\n".join(parts)


def standing(plan: Plan) -> Iterator[str]:
    """What is amiss with accepted runs although nothing of them is to be changed by us."""
    stale = [one for one in plan.vms if one.stale]
    for one in stale[:MOST]:
        yield f"{one.name}: {one.stale}; next: reconciler explain {one.name}"
    if len(stale) > MOST:
        yield f"and {len(stale) - MOST} more VMs of which the like is to be said: reconciler status"
    deaf = [one for one in plan.vms if one.unheard]
    if deaf:  # it is one thing, however many runs suffer from it
        names = some([one.name for one in deaf])
        yield f"{names}: {deaf[0].unheard}; next: reconciler watch (or reconciler serve)"


def things(plan: Plan) -> str:
    """`3 VMs`, `1 tunnel`, `3 VMs and 1 tunnel`: what a plan is about."""
    return counted(len(plan.vms), len(plan.tunnels))


def counted(vms: int, tunnels: int) -> str:
    """The same of numbers; VMs are told where there is nothing else."""
    parts = [f"{vms} VM{'s' * (vms != 1)}"] if vms or not tunnels else []
    parts += [f"{tunnels} tunnel{'s' * (tunnels != 1)}"] if tunnels else []
    return " and ".join(parts)


def total(plan: Plan) -> str:
    """The last line."""
    counts = plan.summary()
    said = [f"{counts[kind]} {word}" for kind, word in _DONE.items() if counts[kind]]
    if counts["call"] > 1:
        said = [part.replace(" call", " calls") for part in said]
    errors = sum(one.severity == "error" for one in plan.diagnostics)
    tail = f" {errors} error{'s' if errors > 1 else ''} in the specs." if errors else ""
    if not plan.changes:
        count = sum(not one.actions and not one.lost_run for one in plan.vms)
        tunnels = sum(not one.actions for one in plan.tunnels)
        fine = counted(count, tunnels) if count or tunnels or not plan.tunnels else "nothing"
        one = count + tunnels == 1 or fine == "nothing"
        fine += f" {'is' if one else 'are'} as declared"
        rest = f"; {', '.join(said)}" if said else ""
        return f"No changes: {fine}{rest}.{tail}"
    return f"Plan: {', '.join(said)}.{tail}"


def _block(
    head: str, rows: Sequence[tuple[str, str, str, str]], colour: bool, width: int
) -> Iterable[str]:
    """A header, and its rows."""
    for number, part in enumerate(_wrapped(head, width)):
        yield paint(part if not number else f"    {part}", None, colour, bold=True)
    subjects = max(cells(row[1]) for row in rows)
    whats = max((cells(row[2]) for row in rows if cells(row[2]) <= 60), default=0)
    for row in rows:
        yield from _lines(*row, subjects=subjects, whats=whats, colour=colour, width=width)


def _vm(one: VmPlan, colour: bool, width: int, plan: Plan | None) -> Iterable[str]:
    for number, part in enumerate(_wrapped(header(one), width)):
        yield paint(part if not number else f"    {part}", None, colour, bold=True)
    joined = _joined(one.actions)
    rows = [_row(actions, one) for actions in joined]
    subjects = max(cells(row[1]) for row in rows)
    whats = max((cells(row[2]) for row in rows if cells(row[2]) <= 60), default=0)
    for actions, row in zip(joined, rows, strict=True):
        yield from _lines(*row, subjects=subjects, whats=whats, colour=colour, width=width)
        if plan is not None:
            yield from (f"        {line}" for line in _sides(actions, one, plan, colour))


def _lines(
    symbol: str,
    subject: str,
    what: str,
    why: str,
    *,
    subjects: int,
    whats: int,
    colour: bool,
    width: int,
) -> Iterable[str]:
    """A row; `subjects`, `whats`: how wide these columns are."""
    indent = " " * (4 + subjects + 3 if width >= NARROW else 6)
    room = max(20, width - len(indent))
    mark = paint(f"{symbol:>3}", _COLOUR[symbol], colour)
    plain = f" {padded(subject, subjects)}   {padded(what, whats)}"
    if 3 + cells(plain) + 3 + cells(why) <= width:
        yield f"{mark}{plain}   {paint(why, 'bright_black', colour)}".rstrip()
        return
    if 3 + cells(plain.rstrip()) <= width:
        yield f"{mark}{plain}".rstrip()
    else:
        yield f"{mark} {subject}"
        yield from (f"{indent}{part}" for part in _wrapped(what, room))
    for part in _wrapped(why, room):
        yield f"{indent}{paint(part, 'bright_black', colour)}"


def _sides(actions: tuple[Action, ...], one: VmPlan, plan: Plan, colour: bool) -> Iterable[str]:
    """Before and after; of an image that is created and then served, once."""
    from reconciler.core.sides import lines, sides

    found: dict[str, None] = {}
    for action in actions:
        both = sides(action, one, plan)
        found |= dict.fromkeys(lines(both) if both else ())
    for line in found:
        yield paint(line, {"+": "green", "-": "red"}.get(line[0]), colour)


def _wrapped(text: str, width: int) -> list[str]:
    if cells(text) <= width:
        return [text]
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _joined(actions: Sequence[Action]) -> list[tuple[Action, ...]]:
    """A disk that is created and then served is one line."""
    rows: list[tuple[Action, ...]] = []
    for action in actions:
        last = rows[-1][0] if rows else None
        if isinstance(action, Start) and isinstance(last, Create) and last.disk == action.disk:
            rows[-1] = (last, action)
        else:
            rows.append((action,))
    return rows


def _row(actions: tuple[Action, ...], one: VmPlan) -> tuple[str, str, str, str]:
    action = actions[-1]
    subject = f"disk {action.disk}" if action.disk is not None else "VM"
    if isinstance(action, Notify):
        subject = one.vm.sna
    what = ", ".join(part.what() for part in actions)
    return SYMBOL[action.kind], subject, what, action.why
