"""wait: light, so nothing here imports pydantic, rich, httpx2 or jinja2."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from reconciler.cli import options, tables
from reconciler.cli.looking import directory, known_names, looked, read
from reconciler.core.errors import Exit, nearest
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import Seconds, format_duration
from reconciler.core.waiting import WISHES, Stand, Wish, stand, tunnel_stand

EVERY: Final[Seconds] = 0.5
"""Between two looks."""


@click.command()
@click.argument("vms", nargs=-1, required=True, metavar="VM…")
@click.option(
    "--for",
    "wish",
    type=click.Choice(list(WISHES)),
    required=True,
    help="; ".join(f"{name}: {meaning}" for name, meaning in WISHES.items()) + ".",
)
@click.option("--run", default="", help="Of this run, also if it is not applied yet.")
@click.option("--timeout", type=options.Duration(), help="How long. [default: ever]")
@options.output("text", "json")
@options.quiet
@click.pass_obj
def wait(
    config: str | None,
    vms: tuple[str, ...],
    wish: Wish,
    run: str,
    timeout: Seconds | None,
    output: str,
) -> int:
    """Stay until VMs are what you wait for. Only looks, and changes nothing.

    Exit 0 when all of them are; 124 when the time is over; 1 at once when one cannot be any more,
    such as Completed of a run that has failed.
    """
    state = directory(config)
    deadline = None if timeout is None else time.monotonic() + timeout
    told: dict[str, str] = {}
    while True:
        found = stands(state, vms, wish, run)
        for name, one in found.items():
            if not one.met and told.get(name) != one.why:
                told[name] = one.why
                options.say(f"... {name}: {one.why}", err=True)
        lost = [name for name, one in found.items() if one.never]
        if lost:
            said = f"cannot become {wish} any more: {tables.some(lost)}"
            options.say(said, err=True, error=True)
            _document(found, wish, output)
            return Exit.ERROR
        if all(one.met for one in found.values()):
            _document(found, wish, output)
            for name, one in found.items():
                if output == "text":
                    options.say(f"{name} is {wish}: {one.why}")
            return Exit.OK
        left = EVERY if deadline is None else deadline - time.monotonic()
        if left <= 0:
            assert timeout is not None
            open_ = [f"{name} ({one.why})" for name, one in found.items() if not one.met]
            options.say(
                f"not waiting any longer than {format_duration(timeout)} for {wish} of: "
                f"{', '.join(open_)}",
                err=True,
                error=True,
            )
            name = next(name for name, one in found.items() if not one.met)
            options.say(f"next: reconciler explain {name}", err=True, error=True)
            _document(found, wish, output)
            return Exit.TIMED_OUT
        time.sleep(min(EVERY, left))


def _document(found: Mapping[str, Stand], wish: Wish, output: str) -> None:
    """How it ended, for programs."""
    if output == "json":
        rows = [
            {"vm": name, "met": one.met, "never": one.never, "message": one.why}
            for name, one in found.items()
        ]
        options.print_json({"format_version": FORMAT_VERSION, "for": wish, "vms": rows})


def stands(state: Path, vms: tuple[str, ...], wish: Wish, run: str) -> Mapping[str, Stand]:
    """How far the wish is for each VM. Raises UsageError for one that this hub never heard of."""
    ledger, _ = read(state)
    applied = known_names(ledger) if ledger and ledger.settings else ()
    known = {*applied, *(ledger.declared if ledger else ())}
    vms = tuple(ledger.context(name, known) if ledger else name for name in vms)
    for name in vms:
        if name not in known:
            hint = nearest(name, known) or f" (known here: {tables.some(sorted(known)) or 'none'})"
            raise click.UsageError(f"this hub has no VM {name!r}{hint}")
    found = {name: Stand(False, "it is declared, and not applied yet") for name in vms}
    there = [name for name in dict.fromkeys(vms) if name in applied]
    if ledger and there:
        plan, actual, _ = looked(ledger, there)
        found |= {one.name: stand(one, actual, ledger, wish, run) for one in plan.vms}
        found |= {one.name: tunnel_stand(one, actual, ledger, wish) for one in plan.tunnels}
    return found
