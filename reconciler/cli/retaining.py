"""retain: remove the backups that are older than their VMs' `keep` says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import click

from reconciler.cli import options, tables
from reconciler.cli.applying import Session
from reconciler.core.chains import taken
from reconciler.core.errors import Exit
from reconciler.core.names import hint
from reconciler.core.retention import Retention, document
from reconciler.core.units import natural, stamp
from reconciler.loop import current, load_settings
from reconciler.orders import Retain
from reconciler.retaining import planned


@click.command()
@click.argument("vms", nargs=-1, metavar="[VM…]")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and why the rest stays.")
@options.lock_timeout
@options.output("text", "json")
@options.quiet
@click.pass_obj
def retain(
    config: str | None,
    vms: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    lock_timeout: float,
    output: str,
) -> int:
    """Remove the backups that are older than `keep` says, of some VMs or of all.

    Shows first what would go, and why each other chain is kept. Only whole chains go: never what
    a kept backup is built on, the newest backup, or what somebody reads. It goes by the `keep` that
    was applied last; without one, everything is kept.
    """
    settings = load_settings(config, os.environ)
    ledger = current(settings)
    unknown = [vm for vm in vms if vm not in ledger.known]
    if unknown:
        known = tables.some(sorted(ledger.known)) or "none"
        near = hint(unknown[0], ledger.known, ledger.shown) or f" (known here: {known})"
        raise click.UsageError(f"this hub never applied a VM {unknown[0]!r}{near}")
    names = list(dict.fromkeys(vms)) or sorted(ledger.known, key=natural)
    found = planned(settings, ledger, names, time.time())
    jobs = tuple(backup.call.job_id for one in found for backup in (*one.unfinished, *one.going))
    if output == "text":
        options.say(_text(found, colour=tables.coloured(sys.stdout)))
    if dry_run or not jobs:
        if output == "json":
            options.print_json(document(ledger.hub, found, done=False))
        return Exit.OK
    if not yes and not options.confirmed("Remove these for good?"):
        return Exit.OK
    concerned = tuple(one.vm for one in found if one.unfinished or one.going)
    session = Session(settings, "reconciler retain", lock_timeout)
    lines = session.order(Retain(vms=concerned, jobs=jobs))
    if output == "json":
        options.print_json(document(ledger.hub, found, done=True))
    else:
        for line in lines:
            options.say(line)
    return Exit.OK


def _text(found: Sequence[Retention], *, colour: bool) -> str:
    """A line per chain: whether it goes, and why or why not."""
    out = []
    for one in found:
        out.append(tables.paint(f"{one.vm}   {_rule(one)}", None, colour, bold=True))
        out += [
            f"  - run {backup.run}: what is left of it (its removal was begun at "
            f"{stamp(backup.removed)})"
            for backup in one.unfinished
        ]
        for fate in one.fates:
            runs = ", ".join(backup.run for backup in fate.chain.kept)
            mark = "-" if fate.goes else "="
            line = f"  {mark} {runs}: {taken([fate.chain])}; {fate.why}"
            out.append(tables.paint(line, "yellow" if fate.goes else None, colour))
    going = [backup for one in found for backup in one.going]
    chains = [fate.chain for one in found for fate in one.fates if fate.goes]
    images = sum(len(backup.disks) for backup in going)
    if going:
        out.append(
            f"{len(going)} backup{'s' if len(going) != 1 else ''} to remove: {images} "
            f"image{'s' if images != 1 else ''}, {taken(chains)}"
        )
    else:
        out.append("No backup is to be removed.")
    return "\n".join(out)


def _rule(one: Retention) -> str:
    if one.keep is None:
        return "no `keep`: everything is kept"
    days = f", and what ended within {one.keep.days:g} days" if one.keep.days else ""
    return f"the newest {one.keep.full} chain{'s' if one.keep.full != 1 else ''}{days}"
