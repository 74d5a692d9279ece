"""pause, resume: leave VMs as they are for a while."""

from __future__ import annotations

import os
import time

import click

from reconciler.cli import options
from reconciler.cli.applying import Session
from reconciler.core.errors import Exit
from reconciler.core.settings import Settings
from reconciler.core.units import Seconds, parse_moment
from reconciler.loop import current, load_settings
from reconciler.orders import Pause, Resume


@click.command()
@click.argument("vms", nargs=-1, metavar="VM…")
@click.option("--all", "every", is_flag=True, help="Every VM, also those that come later.")
@click.option("--reason", required=True, help="Why; whoever asks is told.")
@click.option(
    "--until", metavar="WHEN", help="When it ends by itself: 2h, or 2026-11-26T06:00 (local time)."
)
@options.lock_timeout
@options.quiet
@click.pass_obj
def pause(
    config: str | None,
    vms: tuple[str, ...],
    every: bool,
    reason: str,
    until: str | None,
    lock_timeout: float,
) -> int:
    """Leave VMs as they are: nothing is started, stopped or called for, until they are resumed.

    What runs goes on running, also the appliance. What is being done to them just now is waited
    for. `stop VM` is carried out all the same.
    """
    moment = _moment(until)
    if not reason.strip():
        raise click.UsageError("say why, in --reason")
    settings = load_settings(config, os.environ)
    names = _named(settings, vms, every=every)
    order = Pause(vms=names, reason=reason.strip(), until=moment, every=every)
    for line in Session(settings, "reconciler pause", lock_timeout).order(order):
        options.say(line)
    return Exit.OK


@click.command()
@click.argument("vms", nargs=-1, metavar="VM…")
@click.option("--all", "every", is_flag=True, help="Every VM, whatever it was paused by.")
@options.lock_timeout
@options.quiet
@click.pass_obj
def resume(config: str | None, vms: tuple[str, ...], every: bool, lock_timeout: float) -> int:
    """Have paused VMs as the specs say again."""
    settings = load_settings(config, os.environ)
    names = _named(settings, vms, every=every)
    session = Session(settings, "reconciler resume", lock_timeout)
    for line in session.order(Resume(vms=names, every=every)):
        options.say(line)
    return Exit.OK


def _moment(until: str | None) -> Seconds:
    if until is None:
        return 0.0
    try:
        return parse_moment(until, time.time())
    except ValueError as error:
        raise click.UsageError(f"--until: {error}") from error


def _named(settings: Settings, vms: tuple[str, ...], *, every: bool) -> tuple[str, ...]:
    """The VMs that are meant; with `every`, those that a daemon is to look at."""
    if bool(vms) == every:
        raise click.UsageError("name VMs, or --all")
    if not every:
        return vms
    ledger = current(settings)
    return tuple(sorted({*ledger.applied, *ledger.declared}))
