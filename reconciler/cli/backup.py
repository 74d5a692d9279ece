"""backup: ask for runs, beside the specs of their VMs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from msgspec.structs import replace

from reconciler.asking import ask
from reconciler.asking import findings as wrong_in
from reconciler.cli import options, tables
from reconciler.cli.applying import Session
from reconciler.cli.findings import findings
from reconciler.core import requests as asking
from reconciler.core.declared import CheckedRun
from reconciler.core.errors import Diagnostic, Exit, HostError
from reconciler.core.ledger import Ledger
from reconciler.core.names import hint
from reconciler.core.plan import FORMAT_VERSION, diagnostics_json
from reconciler.core.runs import choose, unfit
from reconciler.core.selector import parse as parse_selector
from reconciler.core.settings import Settings
from reconciler.core.spec import checked_name, checked_run
from reconciler.core.spec_files import read
from reconciler.core.units import Seconds
from reconciler.handover import Asked, Specs
from reconciler.host import requests
from reconciler.host.files import requested
from reconciler.loop import Source, current, load_settings, load_source, parse_all

T = TypeVar("T")

COMMAND: Final = "reconciler backup"
NOT_YET: Final = "not applied yet"
_BEFORE_ALL: Final = (Exit.TIMED_OUT, Exit.INTERRUPTED, Exit.TERMINATED)
"""Exit codes that go before an invalid spec."""


@click.command()
@click.argument("vms", nargs=-1, metavar="[VM…]")
@click.option("-l", "--selector", metavar="LABELS", help="VMs by label: tier=gold,site!=b")
@click.option("--run", "pattern", metavar="NAME", help="The run; {date} and {time} are filled in.")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["full", "incremental"]),
    default="full",
    show_default=True,
)
@click.option(
    "--fallback",
    type=click.Choice(["full"]),
    help="With --type incremental: what it is where none can be made. [default: it is refused]",
)
@options.specs
@options.extra_vars
@click.option("--apply", "at_once", is_flag=True, help="Go on and apply these VMs, and no others.")
@click.option("-y", "--yes", is_flag=True, help="With --apply: do not ask.")
@click.option("--wait", is_flag=True, help="With --apply: stay until the runs have ended.")
@click.option("--timeout", type=options.Duration(), help="With --wait: how long. [default: ever]")
@click.option("--list", "listing", is_flag=True, help="Show what is asked for; change nothing.")
@options.lock_timeout
@options.output("text", "json")
@options.quiet
@click.pass_obj
def backup(
    config: str | None,
    vms: tuple[str, ...],
    selector: str | None,
    pattern: str | None,
    kind: str,
    fallback: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    at_once: bool,
    yes: bool,
    wait: bool,
    timeout: float | None,
    listing: bool,
    lock_timeout: float,
    output: str,
) -> int:
    """Ask for a run of VMs, beside their specs.

    Writes a request per VM, for all or for none; apply does what follows from it. Asking for the
    same run again changes nothing. In --run, {date} is today's date and {time} the time of day,
    both of this machine's clock.
    """
    settings = load_settings(config, os.environ)
    if listing:
        return _list(settings, output)
    if bool(vms) == bool(selector):
        raise click.UsageError("name the VMs, or choose them by label with -l: one of the two")
    if at_once and not yes and not options.can_ask():
        raise click.UsageError("cannot ask without a terminal: add -y to apply without a question")
    if wait and not at_once:
        raise click.UsageError("--wait goes with --apply")
    if timeout is not None and not wait:
        raise click.UsageError("--timeout goes with --wait")
    if fallback and kind != "incremental":
        raise click.UsageError("--fallback goes with --type incremental")
    now = time.time()
    run = _run(pattern, now)
    source, ledger = (
        load_source(files, settings, asking=True, extra=options.extra_texts(extra)),
        current(settings),
    )
    failed = source.specs.failed
    names = _selected(source, selector) if selector else _known(source, vms)
    by = asking.one_line(options.who(COMMAND))
    written = {"run": run, "type": kind, "fallback": fallback, "by": by}
    asked = [checked_run(vm=vm, **written) for vm in names]
    text = output == "text"
    source, verdicts = ask(asked, source, ledger, settings, now, lock_timeout, COMMAND)
    fresh = [one.vm for one, verdict in zip(asked, verdicts, strict=True) if verdict.write]
    if text:
        for verdict in verdicts:
            options.say(verdict.said)
    code: int = Exit.OK
    if at_once:
        going = _going(asked, source, current(settings))
        if going:
            wish = replace(Specs.of(source), only=tuple(sorted(going)))
            session = Session(settings, COMMAND, lock_timeout, quiet=not text)
            session.applier.remember = source.remember
            session.began = now  # who watches may have made all of it since then
            code = session.carry_out(
                Asked(wish, wish.desire(settings, source)),
                output,
                yes=yes,
                wait=wait,
                timeout=timeout,
            )
        elif not text:
            options.print_json(_asked(run, asked, verdicts))
    elif not text:
        options.print_json(_asked(run, asked, verdicts))
    elif fresh:
        options.say(f"next: reconciler apply{_specs(files, source, fresh, settings)}")
    if selector and failed and code not in _BEFORE_ALL:
        code = Exit.INVALID  # among what cannot be read, somebody else may be meant
    return code


def _asked(
    run: str, asked: Sequence[CheckedRun], verdicts: Sequence[asking.Verdict]
) -> Mapping[str, Any]:
    """What came of each, for programs."""
    return {
        "format_version": FORMAT_VERSION,
        "run": run,
        "asked": [
            {"vm": one.vm, "type": one.type, "written": verdict.write, "message": verdict.said}
            for one, verdict in zip(asked, verdicts, strict=True)
        ],
    }


def _told(diagnostics: Sequence[Diagnostic], sources: Mapping[str, str]) -> list[str]:
    colour, width = tables.coloured(sys.stderr), tables.width_of(sys.stderr)
    return findings(diagnostics, sources, colour=colour, width=width)


def _run(pattern: str | None, now: Seconds) -> str:
    """The name of the run. Raises UsageError."""
    if pattern is None:
        raise click.UsageError("name the run: --run NAME, such as --run 'nightly-{date}'")
    local = datetime.fromtimestamp(now).astimezone()
    values = {"date": local.strftime("%Y-%m-%d"), "time": local.strftime("%H%M%S")}
    return _usable(lambda: checked_name(asking.named(pattern, values)))


def _usable(reading: Callable[[], T]) -> T:
    """What can be read of the command line. Raises UsageError."""
    try:
        return reading()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _selected(source: Source, text: str) -> list[str]:
    """The VMs whose labels match; what cannot be read and may match is told."""
    specs = source.specs
    selection = asking.select(specs, _usable(lambda: parse_selector(text)))
    wrong = [one for one in specs.diagnostics if one.severity == "error"]
    for line in _told(wrong, source.lines):
        options.say(line, err=True, error=True)
    for name, why in selection.left_out.items():
        options.say(f"left out: {name}: {why}", err=True)
    if not selection.names:
        there = tables.some(asking.labels(specs), 20) or "none"
        raise click.UsageError(f"no VM to be backed up has the labels {text!r}; there are: {there}")
    return list(selection.names)


def _known(source: Source, vms: Sequence[str]) -> list[str]:
    """The VMs that are named. Raises UsageError, InputError, HostError if one cannot be meant."""
    specs = source.specs
    declared = {one.spec.name: one for one in specs.vms}
    inventory = source.inventory.names if source.inventory else ()
    known = {*declared, *specs.refused, *inventory}
    for name in vms:
        if name in specs.refused:
            raise wrong_in([one for one in specs.diagnostics if one.vm in ("", name)], source.lines)
        if name not in known:
            near = hint(name, known, asking.shown_names(specs, source.inventory))
            near = near or f" (known: {tables.some(sorted(known)) or 'none'})"
            raise click.UsageError(
                f"no spec that is read here declares a VM {name!r}, and no inventory knows it{near}"
            )
        if name in declared and (why := unfit(declared[name])):
            raise HostError(f"cannot ask for a run of {name}: {why}")
    return list(dict.fromkeys(vms))


def _going(asked: Sequence[CheckedRun], source: Source, ledger: Ledger) -> set[str]:
    """The VMs whose run is the one that was asked for: not those that have gone on since."""
    runs = {one.vm: one.run for one in asked}
    return {
        one.spec.name
        for one in choose(source.specs, source.inventory, ledger).vms
        if one.spec.backup and one.spec.backup.run == runs.get(one.spec.name)
    }


def _specs(files: Sequence[str], source: Source, vms: Collection[str], settings: Settings) -> str:
    """What `-f` has to name so that apply is about these VMs."""
    if not files:
        return ""
    declared = {one.spec.name for one in source.specs.vms}
    folder = Path(settings.requests)
    alone = [str(requests.path(folder, vm)) for vm in vms if vm not in declared]
    return "".join(f" -f {file}" for file in (*files, *alone))


def _list(settings: Settings, output: str) -> int:
    """What is asked for, and how each run stands."""
    ledger = current(settings)
    texts = requested(settings.requests)
    documents, wrong = parse_all(texts)
    specs = read([], documents)
    rows = []
    for one in specs.runs:
        spec = one.spec
        call = ledger.latest(spec.vm, spec.run)
        state = str(call.state) if call else NOT_YET
        rows.append([spec.vm, spec.run, spec.type, state, spec.by or "-", one.document.file])
    if output == "json":
        keys = ("vm", "run", "type", "state", "who", "file")
        listed: list[dict[str, Any]] = [dict(zip(keys, row, strict=True)) for row in rows]
        for found in listed:
            found |= {
                "state": None if found["state"] == NOT_YET else found["state"],
                "who": None if found["who"] == "-" else found["who"],
            }
        told = diagnostics_json((*wrong, *specs.diagnostics), {one.file: one.text for one in texts})
        options.print_json(
            {"format_version": FORMAT_VERSION, "requests": listed, "diagnostics": told}
        )
        return Exit.INVALID if wrong or specs.failed else Exit.OK
    if rows:
        heads = ["VM", "RUN", "TYPE", "STATE", "WHO", "FILE"]
        click.echo("\n".join(tables.table(rows, heads, tables.limit(sys.stdout))))
    else:
        click.echo(f"Nothing is asked for in {settings.requests}.")
    for line in _told((*wrong, *specs.diagnostics), {one.file: one.text for one in texts}):
        click.echo(line, err=True)
    return Exit.INVALID if wrong or specs.failed else Exit.OK
