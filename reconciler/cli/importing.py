"""import: servers that this hub does not know, as a spec; taking over those that are its own."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from reconciler.cli import options
from reconciler.core.actions import CHANGES
from reconciler.core.errors import Exit, HostError, UsageError, nearest

if TYPE_CHECKING:
    from reconciler.core.foreign import Seen
    from reconciler.core.inventory import Inventory
    from reconciler.core.plan import Plan
    from reconciler.core.settings import Settings


SPEC = "(what runs here)"
"""What the spec is called that nobody has written down."""


@click.command("import")
@click.argument("vms", nargs=-1, metavar="[VM…]")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the spec there instead."
)
@click.option("--adopt", is_flag=True, help="Take over those that carry this hub's mark.")
@click.option("-y", "--yes", is_flag=True, help="With --adopt: do not ask.")
@options.lock_timeout
@options.output("text", "json")
@click.pass_obj
def importing(
    config: str | None,
    vms: tuple[str, ...],
    out: Path | None,
    adopt: bool,
    yes: bool,
    lock_timeout: float,
    output: str,
) -> int:
    """Print the spec that describes the qemu-nbd servers here which this hub does not know.

    Only looks. What no name or header tells is left empty, and `validate` refuses it. With --adopt,
    servers that carry this hub's mark are taken into its ledger as they run; of all others it says
    why they are not, and what to do. No server is stopped or started by any of this.
    """
    from reconciler.core.foreign import document, place, spec_text
    from reconciler.doctor import listed
    from reconciler.foreign import strangers
    from reconciler.loop import current, load_settings

    if yes and not adopt:
        raise click.UsageError("-y goes with --adopt")
    if out and (adopt or output == "json"):
        raise click.UsageError("--out takes the spec as text, and nothing else with it")
    settings = load_settings(config, os.environ)
    seen = strangers(settings, current(settings))
    names = sorted({place(one).vm for one in seen})
    for vm in vms:
        if vm not in names:
            others = ", ".join(names) or "none"
            raise UsageError(
                f"no server that this hub does not know is of a VM {vm!r}{nearest(vm, names)}; "
                f"they are of: {others}"
            )
    seen = [one for one in seen if not vms or place(one).vm in vms]
    known, _ = listed(settings)
    if adopt:
        return _adopt(settings, seen, known, yes, lock_timeout, output, named=bool(vms))
    spec = spec_text(seen, settings, known, _made(settings))
    if output == "json":
        options.print_json(document(seen, settings, spec))
    elif out:
        from reconciler.host.fresh import write

        write({out: spec})
        click.echo(f"wrote {out}")
        options.say(f"{_counted(seen, spec)}; next: reconciler validate -f {out}", err=True)
    else:
        click.echo(spec, nl=False)
        options.say(f"{_counted(seen, spec)}; to keep it: --out FILE", err=True)
    return Exit.OK


def _counted(seen: Sequence[Seen], spec: str) -> str:
    todo = spec.count("  # TODO")
    some = f"{len(seen)} server{'s' if len(seen) != 1 else ''}"
    return f"{some}, {todo or 'nothing'} left to fill in (TODO)"


def _made(settings: Settings) -> str:
    from reconciler.core.units import stamp

    return f"Made by `reconciler import` on hub {settings.hub} at {stamp(time.time())}."


def _adopt(
    settings: Settings,
    seen: Sequence[Seen],
    known: Inventory | None,
    yes: bool,
    lock_timeout: float,
    output: str,
    *,
    named: bool,
) -> int:
    """Take over what is ours by its mark; say of the others why they are not."""
    from reconciler.core.foreign import advice, document, place, reasons, spec_text

    ours = [one for one in seen if not reasons(one, settings)]
    others = [one for one in seen if one not in ours]
    text = output == "text"
    for one in others if text else ():
        ports = ", ".join(map(str, one.listeners)) or "no TCP port"
        click.echo(f"{place(one).vm}: pid {one.pid} on {ports} is not taken over:")
        for why in reasons(one, settings):
            click.echo(f"  - {why}")
        click.echo(f"  next: {advice(one, settings)}")
    spec = spec_text(ours, settings, known, _made(settings))
    adopted: list[int] = []
    code: int = Exit.OK
    if ours:
        code, vms = _taken_over(settings, spec, yes, lock_timeout, quiet=not text)
        adopted = [one.pid for one in ours if place(one).vm in vms]
    elif text:
        click.echo("no server here carries this hub's mark and is unknown to it")
    if not text:
        options.print_json(document(seen, settings, spec, adopted))
    return code or (Exit.HELD if others and (named or not ours) else Exit.OK)


def _taken_over(
    settings: Settings, spec: str, yes: bool, lock_timeout: float, *, quiet: bool
) -> tuple[int, Collection[str]]:
    """Apply a spec that must come to nothing but adoptions; the exit code, and the VMs."""
    from reconciler.cli.applying import Session
    from reconciler.handover import Asked, Specs
    from reconciler.host.files import Given, Text
    from reconciler.loop import current, dry_run

    session = Session(settings, "reconciler import --adopt", lock_timeout, quiet=quiet)
    wish = Specs(texts=(Text(SPEC, spec),), requests=(), scoped=True, given=Given())
    desired = wish.desire(settings)(current(settings))
    wrong = [one for one in desired.diagnostics if one.severity == "error"]
    for one in wrong:
        options.say(str(one), err=True)
    if wrong:
        options.say(
            "what is not known has to be written by hand: reconciler import --out FILE; then: "
            "reconciler apply -f FILE",
            err=True,
        )
    if not desired.vms:
        return Exit.INVALID, ()
    wish = replace(wish, only=tuple(desired.vms))
    wanted = Asked(wish, wish.desire(settings))
    _only_adopts(dry_run(settings, wanted, os.environ))
    if not yes:
        session.show(dry_run(settings, wanted, os.environ))
        if not options.confirmed("Take these over?"):
            click.echo("nothing was changed", err=True)
            return Exit.OK, ()

    def approved(planned: Plan) -> bool:
        _only_adopts(planned)
        if yes:
            session.show(planned)
        return True

    with session.signals():
        outcome = session.apply_once(wanted, approved=approved)
    assert outcome is not None
    if not quiet:
        session.report(outcome, "text")
    taken = {step.action.vm for step in session.steps if step.ok and step.action.kind == "adopt"}
    code = session.signal_code or outcome.exit_code()
    return code or (Exit.INVALID if wrong else Exit.OK), taken


def _only_adopts(planned: Plan) -> None:
    """Raises NotJustAdopted if anything else would be done."""
    more = [
        f"{action.kind} {one.name}{f' disk {action.disk}' if action.disk is not None else ''}: "
        f"{action.why}"
        for one in planned.vms
        for action in one.actions
        if action.kind in CHANGES and action.kind != "adopt"
    ]
    if more:
        raise NotJustAdopted(
            "cannot take over and nothing else: it would also " + "; ".join(more) + "; to have "
            "that: reconciler import --out FILE; then: reconciler apply -f FILE"
        )


class NotJustAdopted(HostError):  # noqa: N818 a guard, not a fault
    """More would be done than was asked for; nothing was."""

    exit = Exit.HELD
