"""resolve, retry: what a person says about a call."""

from __future__ import annotations

import os
import time

import click

from reconciler.cli import options
from reconciler.cli.applying import Session
from reconciler.core.call import Call, CallEvent, CallState
from reconciler.core.call_plan import LOST
from reconciler.core.desired import Desired, Vm
from reconciler.core.errors import Exit, HostError
from reconciler.core.ledger import Ledger
from reconciler.core.vm_plan import incomplete, new_run
from reconciler.look import Observer
from reconciler.loop import load_settings
from reconciler.orders import Retry, calls_of

_ANSWERS = {
    "accepted": (CallEvent.SAY_ACCEPTED, "the appliance works on it: it is not called again"),
    "completed": (CallEvent.SAY_COMPLETED, "it is complete: its exports are released, as a backup"),
    "failed": (CallEvent.SAY_FAILED, "it has failed: its servers are no longer protected"),
    "resend": (
        CallEvent.RESEND,
        "a new attempt: its servers stop, and the appliance is called again with fresh images",
    ),
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
@click.pass_obj
def resolve(
    config: str | None, vm: str, answer: str | None, reason: str, yes: bool, lock_timeout: float
) -> int:
    """Say what became of a call whose outcome is unknown.

    Look at the appliance first: what you say is believed. --resend is the only way to a second
    call for the same run.
    """
    if answer is None:
        raise click.UsageError("say one of --accepted, --completed, --failed, --resend")
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler resolve", lock_timeout)
    event, meaning = _ANSWERS[answer]
    with session.applier.opened() as store:
        ledger = store.ledger()
        call = _open_call(ledger, vm)
        if call.tainted and event is CallEvent.SAY_COMPLETED:
            why = "a server of it died under a client, so acknowledged writes may be gone"
            if call.reason == LOST:
                why = "its record was lost, and a server may have died under a client meanwhile"
            raise HostError(
                f"cannot call run {call.run} of {vm} completed: {why}; say --failed, and ask for "
                f"a new run: {new_run(vm)}"
            )
        click.echo(
            f"{vm}, run {call.run}, attempt {call.attempt} ({call.state}): {meaning}.", err=True
        )
        if call.state is CallState.ACCEPTED and event is CallEvent.SAY_ACCEPTED:
            click.echo("it is ACCEPTED already: nothing to do", err=True)
            return Exit.OK
        if not yes and not options.confirmed("Say so?"):
            return Exit.OK
        if event is CallEvent.RESEND:
            _nobody_connected(Observer(settings, os.environ), ledger, call)
        if event is CallEvent.SAY_COMPLETED:
            _nothing_lost(Observer(settings, os.environ), ledger, call)
        now = time.time()
        if call.state is CallState.INTENDED:
            call = store.advance(call, CallEvent.CRASH, now)
        if event is CallEvent.RESEND:
            session.applier.take_over(store, call)
            store.another_attempt(call, now, reason)
        else:
            store.advance(call, event, now, message=reason)
        session.applier.say(store, vm, call.run, f"Resolved{answer.capitalize()}", reason)
    click.echo("next: reconciler apply")
    return Exit.OK


@click.command()
@click.argument("vm", metavar="VM")
@options.lock_timeout
@click.pass_obj
def retry(config: str | None, vm: str, lock_timeout: float) -> int:
    """Ask again for a run that was refused or could not be sent.

    For a call whose outcome is unknown there is `resolve`.
    """
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler retry", lock_timeout)
    for line in session.order(Retry(vms=(vm,))):
        click.echo(line)
    click.echo("next: reconciler apply")
    return Exit.OK


def _open_call(ledger: Ledger, vm: str) -> Call:
    """The call of a VM about which something can be said. Raises HostError."""
    call = ledger.active(vm)
    if call:
        return call
    newest = calls_of(ledger, vm)[-1]
    hint = f"; reconciler retry {vm} asks again" if newest.state is CallState.REJECTED else ""
    if newest.state.terminal:
        hint = f"; for another run: {new_run(vm)}"
    raise HostError(
        f"cannot resolve {vm}: no call of it is open; its newest run {newest.run} is "
        f"{newest.state}{hint}"
    )


def _nothing_lost(eyes: Observer, ledger: Ledger, call: Call) -> None:
    """What died or was taken away since the last apply is not in the ledger: it is looked at."""
    vms = {call.vm: Vm(name=call.vm, exported=False)}
    desired = Desired(settings=eyes.settings, vms=vms)
    seen = eyes.look(desired, ledger, ask=False, secrets=False)
    why = incomplete(desired, seen, ledger, eyes.now(), call)
    if why:
        raise HostError(f"cannot call run {call.run} of {call.vm} completed: {why}")


def _nobody_connected(eyes: Observer, ledger: Ledger, call: Call) -> None:
    """Another attempt while a client of this one is connected would be two writers."""
    vms = {call.vm: Vm(name=call.vm, exported=False)}
    seen = eyes.look(Desired(settings=eyes.settings, vms=vms), ledger, ask=False, secrets=False)
    for server in seen.servers:
        if server.mark.vm == call.vm and server.clients:
            raise HostError(
                f"cannot resend run {call.run} of {call.vm}: {server.clients} clients are "
                f"connected to port {server.mark.port}, so the first attempt is alive; say "
                f"--accepted, or cut them off: reconciler stop {call.vm} --kill-clients "
                "--cancel-run"
            )
