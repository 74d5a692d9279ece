"""Plans, status and findings as text for people."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click

from reconciler.core.actions import Action, Create, Notify, Start
from reconciler.core.desired import summary
from reconciler.core.errors import Diagnostic
from reconciler.core.plan import Plan
from reconciler.core.vm_plan import VmPlan

SYMBOL: Final = {
    "create": "+",
    "start": "+",
    "restart": "-/+",
    "adopt": "=",
    "stop": "-",
    "release": "-",
    "call": ">",
    "wait": "~",
    "hold": "!",
    "refuse": "x",
}
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
_MOST: Final = 5
"""Strangers that are named one by one."""
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


def coloured(stream: Any) -> bool:
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str | None, on: bool, *, bold: bool = False) -> str:
    return click.style(text, fg=colour, bold=bold) if on and (colour or bold) else text


def plan_text(plan: Plan, *, colour: bool = False, width: int | None = None) -> str:
    """The plan as a person reads it."""
    if width is None:
        width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
    blocks = ["\n".join(_vm(one, colour, width)) for one in plan.vms if one.actions]
    lines = [str(one) for one in plan.diagnostics]
    notes = foreign_notes(plan)
    named = {(one.pid, port) for one in plan.foreign for port in one.ports}
    notes += [
        f"not ours: {one} is in the port range; skipped"
        for one in plan.strangers[: _MOST * 4]
        if (one.pid, one.port) not in named
    ]
    if plan.untouched:
        notes.append(f"untouched, as no spec here names them: {_some(plan.untouched)}")
    quiet = [one for one in plan.vms if not one.actions]
    parts = ["\n".join(lines)] if lines else []
    parts += blocks
    if quiet and blocks:
        notes.append(f"as declared: {_some([one.name for one in quiet])}")
    if notes:
        parts.append("\n".join(notes))
    parts.append(total(plan))
    return "\n\n".join(parts)


def foreign_notes(plan: Plan) -> list[str]:
    """The servers that are not ours: those in our way each, the rest as a number."""
    near = [one for one in plan.foreign if any(port in plan.ports for port in one.ports)]
    notes = [f"not ours: {one.what}, pid {one.pid}{_where(one)}" for one in near[:_MOST]]
    rest = len(plan.foreign) - len(notes)
    if rest:
        also = "also " if notes else ""
        notes.append(
            f"not ours: {also}{rest} qemu-nbd server{'s' if rest > 1 else ''} outside the port "
            f"range {plan.ports} (`-o json` names all)"
            if len(near) <= _MOST
            else f"not ours: also {rest} other qemu-nbd servers (`-o json` names all)"
        )
    return notes


def _some(names: Sequence[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _where(one: Any) -> str:
    parts = [f"port {', '.join(map(str, one.ports))}"] if one.ports else []
    parts += [one.image] if one.image else []
    return f" ({'; '.join(parts)})" if parts else ""


def total(plan: Plan) -> str:
    """The last line."""
    counts = plan.summary()
    said = [f"{counts[kind]} {word}" for kind, word in _DONE.items() if counts[kind]]
    if counts["call"] > 1:
        said = [part.replace(" call", " calls") for part in said]
    errors = sum(one.severity == "error" for one in plan.diagnostics)
    tail = f" {errors} error{'s' if errors > 1 else ''} in the specs." if errors else ""
    if not plan.changes:
        count = sum(not one.actions for one in plan.vms)
        fine = f"{count} VM{'s are' if count != 1 else ' is'} as declared"
        rest = f"; {', '.join(said)}" if said else ""
        return f"No changes: {fine}{rest}.{tail}"
    return f"Plan: {', '.join(said)}.{tail}"


def header(one: VmPlan) -> str:
    """`ctx-123   run nightly   full   2 disks, 140 GiB → sna site-a`"""
    vm = one.vm
    if not vm.exported:
        return f"{one.name}   absent"
    parts = [one.name]
    if vm.purpose == "backup":
        parts += [f"run {vm.run}", vm.type, f"{summary(vm)} → sna {vm.sna}"]
    else:
        parts += ["restore", summary(vm)]
    if not vm.verified:
        parts.append("DisksUnverified")
    return "   ".join(parts)


def _vm(one: VmPlan, colour: bool, width: int) -> Iterable[str]:
    yield paint(header(one), None, colour, bold=True)
    rows = [_row(action, one) for action in _joined(one.actions)]
    subjects = max(len(row[1]) for row in rows)
    whats = max((len(row[2]) for row in rows if len(row[2]) <= 60), default=0)
    for symbol, subject, what, why in rows:
        mark = paint(f"{symbol:>3}", _COLOUR[symbol], colour)
        line = f"{mark} {subject:<{subjects}}   {what:<{whats}}"
        plain = len(f"{symbol:>3} {subject:<{subjects}}   {what:<{whats}}")
        if plain + 3 + len(why) <= width:
            yield f"{line}   {paint(why, 'bright_black', colour)}".rstrip()
        else:
            yield line.rstrip()
            indent = " " * (4 + subjects + 3)
            for part in _wrapped(why, max(40, width - len(indent))):
                yield f"{indent}{paint(part, 'bright_black', colour)}"


def _wrapped(text: str, width: int) -> list[str]:
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


def findings(diagnostics: Sequence[Diagnostic], *, colour: bool) -> list[str]:
    """Findings, errors in red."""
    return [
        str(one).replace("error:", paint("error:", "red", colour), 1)
        if one.severity == "error"
        else str(one).replace("warning:", paint("warning:", "yellow", colour), 1)
        for one in diagnostics
    ]


def table(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> list[str]:
    """Columns as wide as they need to be."""
    everything = [heads, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(heads))]
    return [
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]


def status_text(document: Mapping[str, Any], *, wide: bool, colour: bool) -> str:
    """A block per VM: how it stands, and a line per disk."""
    rows = []
    for vm in document["vms"]:
        found = {one["type"]: one for one in vm["conditions"]}
        ready = found["Ready"]
        call = vm["call"]
        up = sum(disk["ready"] for disk in vm["disks"])
        served = vm["state"] == "exported" and not released(vm)
        rows.append(
            [
                vm["name"],
                vm["run"] or "-",
                "Ready" if ready["status"] == "True" else "NotReady",
                ready["reason"],
                f"{up}/{len(vm['disks'])}" if served else "-",
                call["state"] if call else "-",
            ]
        )
    lines = table(rows, ["VM", "RUN", "READY", "REASON", "DISKS", "CALL"])
    out = [paint(lines[0], None, colour, bold=True)]
    for line, vm in zip(lines[1:], document["vms"], strict=True):
        ready = next(one for one in vm["conditions"] if one["type"] == "Ready")
        good = ready["status"] == "True"
        out.append(paint(line, "green" if good else "yellow", colour))
        if not good:
            out.append(f"    {ready['message']}")
        if any(one["type"] == "DisksUnverified" for one in vm["conditions"]):
            out.append("    DisksUnverified: no inventory confirms that these are all its disks")
        shown = wide or not released(vm)
        out.extend(_disk(disk, wide) for disk in vm["disks"] if shown or disk["pid"])
        if wide:
            if vm["nbd_targets"]:
                out.append(f"    targets {vm['nbd_targets']}")
            if vm["call"]:
                call = vm["call"]
                out.append(f"    job {call['job_id']} at {call['sna']}, {call['at']}")
                if call["message"]:
                    out.append(f"    {call['message']}")
    return "\n".join(out)


def released(vm: Mapping[str, Any]) -> bool:
    """Its run has ended, so that nothing of it should be served."""
    return any(
        one["type"] == "Exported" and one["reason"] == "Released" for one in vm["conditions"]
    )


def _disk(disk: Mapping[str, Any], wide: bool) -> str:
    if disk["pid"] is None:
        line = f"    disk {disk['key']:<8} not served"
    else:
        state = "answers" if disk["ready"] else "does not answer"
        clients = f"{disk['clients']} client{'s' if disk['clients'] != 1 else ''}"
        line = (
            f"    disk {disk['key']:<8} port {disk['port']:<6} pid {disk['pid']:<8} "
            f"{state:<15} {clients}"
        )
        if disk["restarts"]:
            line += f"   {disk['restarts']} restarts"
    if wide:
        line += f"   {disk['export']}   {disk['image']}"
    return line
