"""serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import click

from reconciler.cli import options
from reconciler.cli.activation import handed_over
from reconciler.cli.applying import Session
from reconciler.cli.hearing import Ears, say
from reconciler.core.errors import Exit, HostError, LockError
from reconciler.core.settings import Settings
from reconciler.host import lock, systemd
from reconciler.host.sockets import PortBusyError
from reconciler.loop import current, load_settings, state_directory_of
from reconciler.serving import Keeper


@click.command()
@options.lock_timeout
@click.pass_obj
def serve(config: str | None, lock_timeout: float) -> int:
    """Take the callbacks of the appliances' clients, and bring runs to their end.

    Stays in the foreground. Whenever a client has reported something, and every `poll` while a run
    is open, the VMs whose run is not finished are made what was applied last. SIGTERM or Ctrl-C
    end it; the servers stay.
    """
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler serve", lock_timeout)
    command = session.applier.command
    ears = Ears(settings, command, given=handed_over(settings.listen))
    with session.signals(), closing(ears), alone(settings, command):
        current(settings)  # a store that cannot be used is said now
        opened(ears)
        assert ears.listener

        def reread() -> Settings:
            fresh = load_settings(config, os.environ)
            ears.renew(fresh)
            return fresh

        keeper = Keeper(
            session.applier,
            reread,
            say,
            check=ears.listener.check,
            kicked=ears.kicked,
        )
        systemd.notify("READY=1")
        say(f"taking callbacks at http://{ears.endpoint} for hub {settings.hub}, {settings.state}")
        if ears.said:
            say(ears.said)
        keeper.run()
    return session.signal_code or Exit.OK


@contextmanager
def alone(settings: Settings, command: str) -> Iterator[None]:
    """One `serve` per state directory, whatever address each would take. Raises LockError."""
    path = state_directory_of(settings) / "serve.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.held(path, command, timeout=0.0))
        except LockError:
            raise LockError(
                f"cannot serve hub {settings.hub}: {lock.holder(path) or 'another process'} does "
                f"so already, on {settings.state}"
            ) from None
        yield


def opened(ears: Ears) -> None:
    """Take the address. Raises LockError (this hub's own process has it), HostError."""
    try:
        ears.open()
    except PortBusyError as busy:
        found, same = ears.taken()
        if same:
            raise LockError(
                f"cannot serve hub {ears.about.hub}: its callbacks are taken by {found.about}; try "
                "again when that has ended"
            ) from None
        raise HostError(
            f"{busy}: {found.what} does; end that, or set `api: {{listen: …}}` in the config"
        ) from None
