"""Status as text for people; light, as `status` is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from reconciler.cli.terminal import cells, padded, safe
from reconciler.cli.terminal import coloured as coloured
from reconciler.cli.terminal import limit as limit
from reconciler.cli.terminal import paint as paint
from reconciler.cli.terminal import width_of as width_of
from reconciler.core.desired import summary
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
KEPT: Final = ("SourceUnreadable", "PruneHeld")
"""Conditions by which a VM is kept as it was, whatever the watched directory says."""
TOLD: Final = ("FellBack", "Implausible", "SpecAhead")
"""Conditions of a run that are said wherever it is shown."""
MOST: Final = 5
"""Strangers that are named one by one."""


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
    if one.unsure:
        parts.append("SpaceUnsure")
    if one.ahead:
        parts.append("SpecAhead")
    return "   ".join(parts)


def source_line(source: Mapping[str, Any]) -> str:
    """`source: /srv/specs at 3f2a1b0c9d8e (Jane Doe: more disks)`, and what is wrong with it."""
    parts = [f"source: {source['directory']}"]
    if source["revision"]:
        dirty = ", changed since" if source["dirty"] else ""
        by = f" ({source['author']}: {source['subject']}{dirty})" if source["commit"] else ""
        parts[0] += f" at {source['revision']}{by}"
    if source["unread"]:
        first, *rest = source["unread"]
        more = f", and {len(rest)} more" if rest else ""
        parts.append(f"not readable since {source['unreadSince']}: {first['message']}{more}")
    inventory = source["inventory"]
    if inventory and inventory["error"]:
        last = f"since {inventory['readAt']}" if inventory["readAt"] else "ever"
        parts.append(
            f"the inventory {inventory['origin']} was not read {last}, so no run begins: "
            f"{inventory['error']}"
        )
    git = source["git"]
    if git and git["error"]:
        parts.append(f"not fetched since {git['failingSince']}: {git['error']}")
    waiting = source["waiting"]
    if waiting:
        many = len(waiting["vms"])
        what = f"{many} removals wait" if many > 1 else "1 removal waits"
        parts.append(f"{what}: reconciler approve {waiting['revision']}")
    return "; ".join(parts)


def kept_line(kind: str, reason: str, message: str) -> str:
    """`PruneHeld: TooMany: …`: why a VM is not as the directory says."""
    return f"{kind}: {message}" if kind == reason else f"{kind}: {reason}: {message}"


def kept_by(holder: str) -> str:
    """Who works on the hub: a daemon keeps it true, a command changes it."""
    kept = "(reconciler watch" in holder
    return f"{'kept true' if kept else 'being changed'} by {holder}"


def foreign_notes(plan: Plan) -> list[str]:
    """The servers that are not ours: those in our way each, the rest as a number."""
    near = [one for one in plan.foreign if any(port in plan.ports for port in one.ports)]
    notes = [f"not ours: {one.what}, pid {one.pid}{_where(one)}" for one in near[:MOST]]
    rest = len(plan.foreign) - len(notes)
    if rest:
        also = "also " if notes else ""
        notes.append(
            f"not ours: {also}{rest} qemu-nbd server{'s' if rest > 1 else ''} outside the port "
            f"range {plan.ports} (`-o json` names all)"
            if len(near) <= MOST
            else f"not ours: also {rest} other qemu-nbd servers (`-o json` names all)"
        )
    return notes


def some(names: Sequence[str], most: int = 8) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _where(one: Any) -> str:
    parts = [f"port {', '.join(map(str, one.ports))}"] if one.ports else []
    parts += [one.image] if one.image else []
    return f" ({'; '.join(parts)})" if parts else ""


def table(
    rows: Sequence[Sequence[str]], heads: Sequence[str], width: int | None = None
) -> list[str]:
    """The heads, then the rows, in columns as wide as they need to be.

    `width`: where they need more columns than that, a row is a block: its first cell, and below it
    the others, each with its head.
    """
    shown = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(heads, *shown, strict=True)]
    if width is not None and sum(widths) + 3 * (len(widths) - 1) > width:
        most = max(map(len, heads[1:]), default=0)
        return [
            heads[0],
            *(
                "\n".join([row[0], *_block(zip(heads[1:], row[1:], strict=True), most)])
                for row in shown
            ),
        ]
    return [
        "   ".join(padded(cell, one) for cell, one in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *shown]
    ]


def _block(pairs: Iterable[tuple[str, str]], most: int) -> Iterable[str]:
    return (f"    {head.lower():<{most}}  {cell}" for head, cell in pairs if cell not in ("", "-"))


def status_text(
    document: Mapping[str, Any],
    progress: Mapping[str, str],
    *,
    wide: bool,
    colour: bool,
    width: int | None = None,
) -> str:
    """A block per VM: how it stands, how far it is (by job id), and a line per disk."""
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
                _call(call, vm["run"]) if call else "-",
            ]
        )
    lines = table(rows, ["VM", "RUN", "READY", "REASON", "DISKS", "CALL"], width)
    out = [paint(lines[0], None, colour, bold=True)]
    for line, vm in zip(lines[1:], document["vms"], strict=True):
        ready = next(one for one in vm["conditions"] if one["type"] == "Ready")
        good = ready["status"] == "True"
        out.append(paint(line, "green" if good else "yellow", colour))
        if not good:
            out.append(f"    {ready['message']}")
        out.extend(
            f"    {kept_line(one['type'], one['reason'], one['message'])}"
            for one in vm["conditions"]
            if (one["type"] in KEPT or (one["type"] == "Paused" and one["status"] == "True"))
            and one["message"] != ready["message"]
            and one["message"] not in out[-1]
        )
        if any(one["type"] == "DisksUnverified" for one in vm["conditions"]):
            out.append("    DisksUnverified: no inventory confirms that these are all its disks")
        out.extend(
            f"    {kind}: {found[kind]['message']}"
            for found in [{one["type"]: one for one in vm["conditions"]}]
            for kind in ("Stale", "Unheard", *TOLD)
            if kind in found and found[kind]["status"] == "True"
        )
        if vm["call"] and (said := progress.get(vm["call"]["job_id"])):
            out.append(f"    {said}")
        shown = wide or not released(vm)
        out.extend(_disk(disk, wide) for disk in vm["disks"] if shown or disk["pid"])
        if wide:
            out.extend(
                f"    SpaceUnsure: {one['message']}"
                for one in vm["conditions"]
                if one["type"] == "SpaceUnsure"
            )
            if vm["nbd_targets"]:
                out.append(f"    targets {vm['nbd_targets']}")
            if vm["call"]:
                call = vm["call"]
                out.append(f"    job {call['job_id']} at {call['sna']}, {call['at']}")
                if call["message"]:
                    out.append(f"    {call['message']}")
    return "\n".join(out)


def _call(call: Mapping[str, Any], run: str | None) -> str:
    """Where the call stands; of which run, if that is not the one that is wanted."""
    other = run is not None and call["run"] != run
    return f"{call['state']} (run {call['run']})" if other else str(call["state"])


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
            line += f"   {disk['restarts']} restart{'s' if disk['restarts'] != 1 else ''}"
        if disk["reported"]:
            line += "   reported"
    if wide:
        line += f"   {disk['export']}   {disk['image']}"
    return line
