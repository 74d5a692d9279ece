"""resolve, retry: what a person says about a call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

import click

from reconciler.cli import options
from reconciler.cli.applying import Session
from reconciler.core.call import CallState
from reconciler.core.errors import Exit
from reconciler.loop import current, load_settings
from reconciler.orders import Resolve, Retry, Verdict, answerable, open_call

_MEANING: Final[Mapping[Verdict, str]] = {
    "accepted": "the appliance works on it: it is not called again",
    "completed": "it is complete: its exports are released, as a backup",
    "failed": "it has failed: its servers are no longer protected",
    "resend": "a new attempt: its servers stop, and the appliance is called again with fresh "
    "images",
}


@click.command()
@click.argument("vm", metavar="VM")
@click.option("--accepted", "answer", flag_value="accepted", help="The appliance works on it.")
@click.option("--completed", "answer", flag_value="completed", help="It has ended well.")
@click.option("--failed", "answer", flag_value="failed", help="It has ended badly, or never began.")
@click.option("--resend", "answer", flag_value="resend", help="Open another attempt.")
@click.option("--reason", required=True, help="Why you know; it is written down.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@options.lock_timeout
@options.quiet
@click.pass_obj
def resolve(
    config: str | None, vm: str, answer: Verdict | None, reason: str, yes: bool, lock_timeout: float
) -> int:
    """Say what became of a call whose outcome is unknown.

    Look at the appliance first: what you say is believed. --resend is the only way to a second
    call for the same run.
    """
    if answer is None:
        raise click.UsageError("say one of --accepted, --completed, --failed, --resend")
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler resolve", lock_timeout)
    call = open_call(current(settings), vm)
    answerable(call, answer)
    options.say(
        f"{vm}, run {call.run}, attempt {call.attempt} ({call.state}): {_MEANING[answer]}.",
        err=True,
    )
    if call.state is CallState.ACCEPTED and answer == "accepted":
        options.say("it is ACCEPTED already: nothing to do", err=True)
        return Exit.OK
    if not yes and not options.confirmed("Say so?"):
        return Exit.OK
    order = Resolve(vms=(vm,), verdict=answer, reason=reason, key=call.key, state=call.state)
    for line in session.order(order):
        options.say(f"{vm}, run {call.run}: {line}", err=True)
    options.say("next: reconciler apply")
    return Exit.OK


@click.command()
@click.argument("vm", metavar="VM")
@options.lock_timeout
@options.quiet
@click.pass_obj
def retry(config: str | None, vm: str, lock_timeout: float) -> int:
    """Ask again for a run that was refused or could not be sent.

    For a call whose outcome is unknown there is `resolve`.
    """
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler retry", lock_timeout)
    for line in session.order(Retry(vms=(vm,))):
        options.say(line)
    options.say("next: reconciler apply")
    return Exit.OK
