"""status, explain, version: light, so nothing here imports pydantic, rich, httpx2 or jinja2."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from reconciler import __version__
from reconciler.cli import options, tables
from reconciler.core.actual import Actual
from reconciler.core.call import Call, Report
from reconciler.core.desired import Desired, Vm
from reconciler.core.errors import ConfigError, Diagnostic
from reconciler.core.ledger import Ledger
from reconciler.core.mark import parse as served_by
from reconciler.core.names import hint
from reconciler.core.plan import FORMAT_VERSION, Plan
from reconciler.core.plan import plan as planned
from reconciler.core.settings import REQUESTS, Settings, state_directory
from reconciler.core.status import by_type, conditions, disks, document, progress_text, since
from reconciler.core.tunnel import Tunnel
from reconciler.core.units import format_duration, stamp
from reconciler.core.vm_plan import VmPlan
from reconciler.host import files, lock, proc, store
from reconciler.look import Observer

if TYPE_CHECKING:
    from reconciler.cli.asked import Waiting
    from reconciler.core.selector import Choice


@click.command()
@options.output("text", "json")
def version(output: str) -> None:
    """Show the version."""
    if output == "json":
        options.print_json({"format_version": FORMAT_VERSION, "version": __version__})
    else:
        click.echo(f"reconciler {__version__}")


@click.command()
@click.argument("vms", nargs=-1, metavar="[VM…]")
@options.choice
@options.output("text", "wide", "json", "name", "table")
@click.option(
    "-w", "--watch", "watching", is_flag=True, help="Show it again when it changes, until Ctrl-C."
)
@click.option(
    "-n",
    "--interval",
    type=options.Duration(),
    default="2s",
    show_default=True,
    help="With --watch: between two looks.",
)
@click.pass_obj
def status(
    config: str | None,
    vms: tuple[str, ...],
    selector: str | None,
    patterns: tuple[str, ...],
    output: str,
    watching: bool,
    interval: float,
) -> None:
    """What was applied last, against what really runs: processes, ports, handshakes.

    Reads only; works while another command is changing things.
    """
    choice = None
    if patterns or selector is not None:
        from reconciler.core.selector import Choice

        try:
            choice = Choice.read(patterns, selector)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if watching:
        from reconciler.cli.redrawing import redraw

        redraw(partial(show_status, config, vms, output, choice), max(interval, 0.1))
    show_status(config, vms, output, choice)


def show_status(
    config: str | None, vms: Collection[str], output: str, choice: Choice | None = None
) -> None:
    """Print the status once."""
    state = directory(config)
    ledger, holder = read(state)
    asked = waiting(state, ledger)
    if ledger is None or not ledger.settings:
        if output == "json":
            empty: dict[str, Any] = {"hub": None, "source": None, "vms": [], "tunnels": []}
            empty["asked"] = asked.to_json() if asked else []
            options.print_json({"format_version": FORMAT_VERSION, **empty})
        elif output != "name":
            click.echo(f"Nothing was applied here yet (state: {state}).")
            for line in unremembered():
                click.echo(line)
            told = asked.lines(holder) if asked else []
            click.echo("\n".join(told or ["next: reconciler plan -f specs/"]))
        return
    vms = [ledger.context(name, known_names(ledger)) for name in vms]
    if choice:
        vms = chosen(ledger, vms, choice)
    asked = asked.of(vms) if asked and (vms or choice) else asked
    plan, actual, now = looked(ledger, vms, asked.vms if asked else ())
    value = document(plan, actual, ledger, now)
    if output == "json":
        options.print_json({**value, "asked": asked.to_json() if asked else []})
        return
    if output == "name":
        for vm in value["vms"]:
            click.echo(vm["name"])
        for one in plan.tunnels:
            click.echo(one.name)
        return
    if value["source"]:
        click.echo(tables.source_line(value["source"]))
    if value["vms"]:
        wide = output == "wide"
        progress = {job: progress_text(said, now) for job, said in ledger.telemetry.items()}
        colour = tables.coloured(sys.stdout)
        width = tables.limit(sys.stdout)
        said = tables.status_text(value, progress, wide=wide, colour=colour, width=width)
        click.echo(said)
    elif not value["tunnels"]:
        click.echo("No VM is exported.")
    if value["tunnels"]:
        from reconciler.cli import tunnels

        colour, width = tables.coloured(sys.stdout), tables.limit(sys.stdout)
        blocks = tunnels.status_lines(
            value["tunnels"], colour=colour, width=width, wide=output == "wide"
        )
        click.echo("\n".join(([""] if value["vms"] else []) + blocks))
    for note in tables.foreign_notes(plan):
        click.echo(note)
    unknown = [name for name in plan.untouched if name not in known_names(ledger)]
    if unknown:
        click.echo(
            f"not in the ledger, but running with our mark: {', '.join(unknown)}; "
            "apply their specs to adopt them"
        )
    if holder:
        click.echo(tables.kept_by(holder))
    for line in asked.lines(holder) if asked else ():
        click.echo(line)


def chosen(ledger: Ledger, vms: Collection[str], choice: Choice) -> list[str]:
    """The VMs that are named, or all, as far as they are chosen by what was applied of them."""
    labels = {
        name: dict(applied.vm.get("labels") or {})
        for name, applied in ledger.applied.items()
        if not vms or name in vms
    }
    try:
        return choice.of(labels)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


@click.command()
@click.argument("vm", metavar="VM")
@options.output("text", "json")
@click.pass_obj
def explain(config: str | None, vm: str, output: str) -> None:
    """What one VM waits for, since when, the last error, and what to type next."""
    state = directory(config)
    ledger, holder = read(state)
    known = known_names(ledger) if ledger else {}
    vm = ledger.context(vm, known) if ledger else vm
    asked = waiting(state, ledger)
    asked = asked and asked.of([vm])
    if ledger is None or not ledger.settings or vm not in known:
        if asked and asked.requests:
            asked.explain(ledger.hub if ledger else None, holder, output)
            return
        if ledger and vm in ledger.declared:
            show_declared(ledger, vm, holder, output)
            return
        near = hint(vm, known, {}) or f" (known here: {', '.join(sorted(known)) or 'none'})"
        raise click.UsageError(
            f"this hub never applied a VM {vm!r}{near}; where a spec declares it: reconciler plan "
            f"--vm {vm}"
        )
    plan, actual, now = looked(ledger, [vm])
    if plan.tunnels:
        from reconciler.cli import tunnels

        tunnels.show(plan, actual, ledger, now, holder, state, output)
        return
    one = plan.vms[0]
    if output == "json":
        told = explained(plan, actual, ledger, now, holder, state, asked)
        options.print_json(told)
        return
    click.echo(tables.header(one))
    found = by_type(conditions(one, actual, ledger))
    ready = found["Ready"]
    for_long = format_duration(now - since(vm, ready, ledger, now))
    click.echo(
        f"  {'ready' if ready.status == 'True' else 'not ready'}: {ready.reason}, for {for_long}"
    )
    click.echo(f"    {ready.message}")
    for condition in found.values():
        if condition.status == "False" and condition.type in ("PortsAllocated", "Exported"):
            click.echo(f"  {condition.type}: {condition.reason}: {condition.message}")
        paused = condition.type == "Paused" and condition.status == "True"
        if condition.type in tables.KEPT or (paused and ready.status == "True"):
            said = tables.kept_line(condition.type, condition.reason, condition.message)
            click.echo(f"  {said}")
    call = one.call
    if call:
        ago = format_duration(now - call.changed)
        click.echo(f"  call: {call.state} for {ago}, job {call.job_id} at SNA {call.sna}")
        if call.message:
            click.echo(f"    {call.message}")
        if call.retry_at > now:
            click.echo(
                f"    next try in {format_duration(call.retry_at - now)}, or at once by apply"
            )
        for line in heard(call, one, actual, ledger, now):
            click.echo(f"    {line}")
    for kind in tables.TOLD:
        if kind in found and found[kind].status == "True":
            click.echo(f"  {kind}: {found[kind].message}")
    if one.unsure:
        click.echo(f"  SpaceUnsure: {one.unsure}")
    if any(action.cause == "RunActive" and action.kind == "wait" for action in one.actions):
        waited = format_duration(max(0.0, now - ledger.applied[vm].at))
        click.echo(f"  waits: run {one.vm.run}, for {waited}, until run {call and call.run} ends")
    for action in one.actions:
        where = f"disk {action.disk}" if action.disk is not None else "VM"
        click.echo(f"  {tables.SYMBOL[action.kind]:>3} {where}: {action.what()}: {action.why}")
    if holder:
        click.echo(f"  {tables.kept_by(holder)}")
    past = store.events(state, vm, 5)
    if past:
        click.echo("  last events:")
        for event in past:
            ago = format_duration(max(0.0, now - event.last))
            times = f" (×{event.count})" if event.count > 1 else ""
            disk = f" disk {event.disk}" if event.disk is not None else ""
            click.echo(f"    {ago} ago{disk}: {event.reason}: {event.message}{times}")
    for request in asked.requests if asked else ():
        click.echo(f"  {request.sentence}")
    click.echo(f"next: {onward(one, plan, ready.reason, ledger, asked, holder)}")


def onward(
    one: VmPlan, plan: Plan, reason: str, ledger: Ledger, asked: Waiting | None, holder: str
) -> str:
    """The one command that goes on from here: where nothing is to be done, what is asked for."""
    from reconciler.core.onward import next_command  # nobody else needs it

    amiss = one.tainted_run or one.stale or one.unheard
    if asked and asked.requests and not one.actions and not amiss:
        return asked.following(holder)
    requests = Settings.from_json(ledger.settings).requests
    return next_command(one, plan, reason, requests, ledger)


def explained(
    plan: Plan,
    actual: Actual,
    ledger: Ledger,
    now: float,
    holder: str,
    state: Path,
    asked: Waiting | None,
) -> dict[str, Any]:
    """What one VM waits for, as a document: its status, and what would be done about it."""
    from reconciler.cli.telling import to_json

    one = plan.vms[0]
    whole = document(plan, actual, ledger, now)
    ready = by_type(conditions(one, actual, ledger))["Ready"]
    changes = plan.to_json()["changes"]
    return {
        "format_version": FORMAT_VERSION,
        "hub": whole["hub"],
        "vm": whole["vms"][0],
        "since": stamp(since(one.name, ready, ledger, now)),
        "asked": asked.to_json() if asked else [],
        "actions": [change for change in changes if change["vm"] == one.name],
        "retry_at": stamp(one.call.retry_at) if one.call and one.call.retry_at > now else None,
        "changed_by": holder or None,
        "events": [to_json(event) for event in store.events(state, one.name, 5)],
        "next": onward(one, plan, ready.reason, ledger, asked, holder),
    }


def show_declared(ledger: Ledger, vm: str, holder: str, output: str) -> None:
    """`explain` of a VM that the watched directory declares, and that was never applied."""
    declared = ledger.declared[vm]
    gone = f", and not any more since {stamp(declared.gone)}" if declared.gone else ""
    unread: dict[str, str] = ledger.source.get("unread") or {}
    wrong = unread.get(declared.file, "")
    file = os.path.join(ledger.source.get("directory", ""), declared.file)
    # Who watches has not applied it, and plan says why; else nobody has tried.
    command = "validate" if wrong else "plan" if holder else "apply"
    onward = "nothing" if gone else f"reconciler {command} -f {file}"
    if output == "json":
        options.print_json(
            {
                "format_version": FORMAT_VERSION,
                "hub": ledger.hub,
                "vm": None,
                "declared": {"file": file, "revision": declared.revision},
                "since": stamp(declared.at),
                "asked": [],
                "actions": [],
                "retry_at": None,
                "changed_by": holder or None,
                "events": [],
                "next": onward,
            }
        )
        return
    click.echo(f"{vm}   never applied here")
    click.echo(
        f"  {file} declares it, as read at {stamp(declared.at)} (revision "
        f"{declared.revision}){gone}"
    )
    if wrong:
        click.echo(f"  it cannot be read now: {wrong}")
    if holder:
        click.echo(f"  {tables.kept_by(holder)}")
    click.echo(f"next: {onward}")


def heard(call: Call, one: VmPlan, actual: Actual, ledger: Ledger, now: float) -> Iterator[str]:
    """What the appliance's client says of an open call."""
    if not call.state.active:
        return
    if said := ledger.telemetry.get(call.job_id):
        yield f"progress: {progress_text(said, now)}"
    if word := ledger.words.get(call.job_id):
        ago = format_duration(max(0.0, now - word.since))
        yield f"SNA {call.sna} {told(word.report)} (first heard {ago} ago)"
    if one.stale:
        yield f"stale: {one.stale}"
    if one.unheard:
        yield f"unheard: {one.unheard}"
    views = disks(one, actual, ledger)
    arrived = [str(view.export.key) for view in views if view.reported]
    if arrived:
        yield f"reported complete: {len(arrived)} of {len(views)} disks ({', '.join(arrived)})"


def told(report: Report) -> str:
    """`says: running`, or why it says nothing: what its status came to when it was asked."""
    if report.known is None:
        return f"cannot be asked: {report.message}"
    if not report.known:
        return "says: it does not know the job"
    said = f": {report.message}" if report.message else ""
    return f"says: {report.status or 'no status'}{said}"


def unremembered() -> list[str]:
    """What runs with a mark of ours although nothing is remembered: a state directory was lost, or
    is elsewhere."""
    found: dict[tuple[str, str, str], int] = {}
    for process in proc.processes():
        served = served_by(process.argv)
        if served and served.mark:
            key = (served.mark.hub, served.mark.vm, served.mark.run)
            found[key] = found.get(key, 0) + 1
    return [
        f"running all the same: {count} server{'s' if count > 1 else ''} of VM {vm}, run {run}, "
        f"hub {hub}"
        for (hub, vm, run), count in sorted(found.items())
    ]


def read(state: Path) -> tuple[Ledger | None, str]:
    """The ledger as it is, and who is changing the hub meanwhile."""
    holder = lock.holder(state / "lock")
    busy = str(holder) if holder else ""
    ledger = store.read(state)
    return (replace(ledger, busy=busy) if ledger else None), busy


def directory(config: str | None) -> Path:
    """The state directory, from as little of the configuration as is needed. Raises ConfigError."""
    path = files.config_path(config, os.environ)
    written: object = None
    if path is not None:
        read = files.read(path)
        if read.error:
            raise ConfigError([Diagnostic("error", read.error)])
        plain = re.findall(r"(?m)^state:[ \t]*[\"']?([\w./-]+)[\"']?[ \t]*(?:#.*)?$", read.text)
        if len(plain) == 1:
            written = plain[0]  # as nearly every config has it: YAML need not be loaded for it
        elif "state" in read.text:
            from reconciler.core.document import parse

            parsed, wrong = parse(read.text, path)
            if wrong:
                raise ConfigError(wrong)
            value = parsed.value if parsed else None
            written = value.get("state") if isinstance(value, dict) else None
        if isinstance(written, str):
            written = os.path.join(os.path.dirname(os.path.abspath(path)), written)
    return Path(os.path.normpath(state_directory(written, os.environ, root=os.geteuid() == 0)))


def known_names(ledger: Ledger) -> Collection[str]:
    """Every VM and tunnel that was ever applied here."""
    return ledger.applied.keys() | ledger.tunnels.keys()


def waiting(state: Path, ledger: Ledger | None) -> Waiting | None:
    """Runs that are asked for and that nobody has begun; None: nothing was ever asked for."""
    folder = state / REQUESTS
    if not folder.is_dir():
        return None
    from reconciler.cli.asked import Waiting

    return Waiting.below(folder, ledger)


def looked(
    ledger: Ledger, vms: Collection[str], asked: Collection[str] = ()
) -> tuple[Plan, Actual, float]:
    """What would have to be done about what was applied; the VMs named, or all worth showing.

    `asked`: VMs that may be named all the same. Raises UsageError.
    """
    names = known_names(ledger)
    unknown = [name for name in vms if name not in names and name not in asked]
    if unknown:
        known = ", ".join(sorted(names)) or "none"
        near = hint(unknown[0], names, {}) or f" (known here: {known})"
        raise click.UsageError(f"this hub never applied a VM {unknown[0]!r}{near}")
    settings = Settings.from_json(ledger.settings)
    leased = {lease.vm for lease in ledger.leases}
    wanted = {}
    for name, applied in ledger.applied.items():
        vm = Vm.from_json(applied.vm)
        if name in vms or (not vms and (vm.exported or name in leased)):
            wanted[name] = vm
    tunnels = {
        name: Tunnel.from_json(applied.vm)
        for name, applied in ledger.tunnels.items()
        if not vms or name in vms
    }
    desired = Desired(settings=settings, vms=wanted, tunnels=tunnels)
    actual = Observer(settings, os.environ).look(desired, ledger, ask=False, secrets=False)
    now = time.time()
    return planned(desired, actual, ledger, now), actual, now
