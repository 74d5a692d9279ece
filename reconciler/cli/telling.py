"""events: light, so nothing here imports pydantic, rich, httpx2 or jinja2."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final

import click

from reconciler.cli import options, tables
from reconciler.cli.looking import directory
from reconciler.core.errors import nearest
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import Seconds, stamp
from reconciler.host import store
from reconciler.host.store import Event

EVERY: Final[Seconds] = 0.5
"""Between two looks at the store, which cost about a millisecond each."""
OVERLAP: Final[Seconds] = 5.0
"""How far back each looks: a clock may be set, and a write is later than the moment it tells."""
MOST: Final = 10_000
"""Events that are read where the newest are to be known; what is told later is not one of them."""


@click.command()
@click.argument("vms", nargs=-1, metavar="[VM…]")
@click.option("-w", "--watch", "watching", is_flag=True, help="Go on telling, until Ctrl-C.")
@click.option("--since", type=options.Duration(), help="Those of the last 30s, 5m, 1h30m …")
@click.option(
    "-n", "limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many."
)
@options.output("text", "json")
@click.pass_obj
def events(
    config: str | None,
    vms: tuple[str, ...],
    watching: bool,
    since: Seconds | None,
    limit: int,
    output: str,
) -> None:
    """What happened to VMs, newest last. What repeats within an hour is one event, with a count.

    With -w and -o json, each event is a document in a line of its own.
    """
    where = directory(config)
    vms = _known(where, vms)
    begin = 0.0 if since is None else time.time() - since
    seen = store.newest_events(where, vms, limit=MOST if watching else limit, since=begin)
    found = seen[-limit:]
    if output == "json" and not watching:
        value = {"format_version": FORMAT_VERSION, "events": [to_json(one) for one in found]}
        options.print_json(value)
        return
    if not found and not watching:
        click.echo("No event.")
    _tell(found, output)
    if watching:
        follow(where, vms, seen or store.newest_events(where, vms, limit=MOST), output)


def follow(where: Path, vms: Collection[str], seen: Collection[Event], output: str) -> None:
    """Tell what comes after what was seen, and what comes again, until somebody ends us."""
    counts = {one.number: one.count for one in seen}
    number = max(counts, default=0)
    since = max((one.last for one in seen), default=0.0)
    while True:
        time.sleep(EVERY)
        found = store.later_events(where, vms, number=number, since=since - OVERLAP)
        fresh = [one for one in found if counts.get(one.number) != one.count]
        _tell(fresh, output)
        counts |= {one.number: one.count for one in fresh}
        number = max(number, *(one.number for one in fresh), 0)
        since = max(since, *(one.last for one in fresh), 0.0)


def _known(where: Path, vms: Collection[str]) -> tuple[str, ...]:
    """The contexts of these VMs. Raises UsageError if this hub never heard of one of them."""
    ledger = store.read(where) if vms else None
    known = {*ledger.known, *ledger.declared} if ledger else set()
    names = tuple(ledger.context(name, known) if ledger else name for name in vms)
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f" (known here: {tables.some(sorted(known)) or 'none'})"
            raise click.UsageError(f"this hub has no VM {name!r}{hint}")
    return names


def _tell(found: Iterable[Event], output: str) -> None:
    colour = tables.coloured(sys.stdout)
    for one in found:
        click.echo(json.dumps(to_json(one)) if output == "json" else line(one, colour=colour))
    sys.stdout.flush()


def line(event: Event, *, colour: bool = False) -> str:
    """`2026-11-25T22:19:01Z  ctx-1 disk 2000: Restarted: … answers on 10100 (×3 since …)`"""
    who = (event.vm or "hub") + (f" disk {event.disk}" if event.disk is not None else "")
    text = f"{stamp(event.last)}  {who}: {event.reason}: {event.message}"
    if event.count > 1:
        text += f" (×{event.count} since {stamp(event.first)})"
    return tables.paint(text, "yellow" if event.severity != "Normal" else None, colour)


def to_json(event: Event) -> dict[str, Any]:
    """An event for programs; the same `id` with another `count` is the same, once more."""
    return {
        "id": event.number,
        "vm": event.vm or None,
        "disk": None if event.disk is None else str(event.disk),
        "run": event.run or None,
        "severity": event.severity,
        "reason": event.reason,
        "message": event.message,
        "count": event.count,
        "first": stamp(event.first),
        "last": stamp(event.last),
        "who": event.who or None,
    }
