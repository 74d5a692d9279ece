"""state: what the hub remembers, looked into, backed up and put back."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from reconciler.cli import options
from reconciler.cli.looking import directory
from reconciler.core.errors import ConfigError, Diagnostic, Exit
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import format_duration, format_size, stamp
from reconciler.host import lock, store
from reconciler.host.store import copies


@click.group()
def state() -> None:
    """What the hub remembers: ports, calls, events.

    \b
    reconciler state info              what is in it, and whether it is sound
    reconciler state backup FILE       copy it, while others work
    reconciler state restore FILE      put a copy in its place; what was there is kept
    """


@state.command()
@click.argument("file", required=False, metavar="[FILE]", type=click.Path(path_type=Path))
@options.output("text", "json")
@click.pass_obj
def info(config: str | None, file: Path | None, output: str) -> int:
    """What is in the state directory, or in a copy, and whether it is sound.

    Reads only; works while another command is changing things. Exit 1 if it is damaged.
    """
    where = directory(config)
    path = file or where / store.NAME
    found = copies.facts(path)
    busy = lock.holder(where / "lock") if file is None else None
    if output == "json":
        value = _document(found) if found else {"path": str(path), "hub": None}
        busy_text = str(busy) if busy else None
        options.print_json({"format_version": FORMAT_VERSION, **value, "busy": busy_text})
    elif found is None:
        click.echo(f"There is no store in {path}: nothing was applied here yet.")
    else:
        for line in _lines(found):
            click.echo(line)
        if busy:
            click.echo(f"being changed by {busy}")
    return Exit.ERROR if found and found.wrong else Exit.OK


@state.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@click.pass_obj
def backup(config: str | None, file: Path, force: bool) -> int:
    """Copy what the hub remembers to FILE, as it is at one moment, while others work.

    The copy is checked before it gets its name.
    """
    done = copies.backup(directory(config), file, overwrite=force)
    click.echo(f"{file}: {_sentence(done)}")
    return Exit.OK


@state.command()
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@options.lock_timeout
@click.pass_obj
def restore(config: str | None, file: Path, yes: bool, lock_timeout: float) -> int:
    """Put the copy FILE in the place of what the hub remembers; what was there is kept.

    Nothing is called twice by that: of what the copy does not know, the repositories tell, and it
    is held as UNKNOWN.
    """
    from reconciler.loop import Applier, load_settings

    settings = load_settings(config, os.environ)
    applier = Applier(
        settings,
        os.environ,
        emit=lambda _: None,
        command=options.who("reconciler state restore"),
        lock_timeout=lock_timeout,
        waiting=lambda holder: options.say(f"waiting for {holder} …", err=True),
    )
    with applier.locked() as where:
        found = copies.check(file, where)
        if found.hub != settings.hub:
            said = (
                f"cannot restore {file} for hub {settings.hub!r}: it is of hub {found.hub!r}, "
                f"whose servers carry that name; write `hub: {found.hub}`, or take another copy"
            )
            raise ConfigError([Diagnostic("error", said)])
        click.echo(f"to restore   {file}: {_sentence(found)}", err=True)
        click.echo(f"there now    {where / store.NAME}: {_present(where)}", err=True)
        if not yes:
            if not options.can_ask():
                raise click.UsageError("cannot ask without a terminal: add -y to restore this")
            if not click.confirm("Restore it?", default=False, err=True):
                click.echo("nothing was changed", err=True)
                return Exit.OK
        aside = copies.restore(file, where)
    kept = f"; what was there is in {aside}" if aside else ""
    click.echo(f"{where / store.NAME} is {file} now{kept}.")
    click.echo("A run that was asked for since is held as UNKNOWN until you resolve it.")
    click.echo("next: reconciler plan")
    return Exit.OK


def _present(where: Path) -> str:
    """What is to be replaced; it may be the reason of the restore."""
    try:
        found = copies.facts(where / store.NAME)
    except store.StoreError as error:
        return str(error)
    return _sentence(found) if found else "nothing"


def _sentence(found: copies.Facts) -> str:
    calls = ", ".join(f"{count} {name}" for name, count in found.calls.items()) or "none"
    newest = f", the newest of {_moment(found.newest)}" if found.newest else ""
    return (
        f"hub {found.hub}, state id {found.state_id}, schema {found.schema}, "
        f"{format_size(found.size)}; calls: {calls}{newest}; "
        f"{found.leases} port{'s' if found.leases != 1 else ''} leased"
    )


def _lines(found: copies.Facts) -> list[str]:
    calls = ", ".join(f"{count} {name}" for name, count in found.calls.items()) or "none"
    return [
        f"path        {found.path}",
        f"hub         {found.hub}",
        f"state id    {found.state_id}",
        f"home        {found.home or 'not noted'}",
        f"schema      {found.schema}",
        f"size        {format_size(found.size)}",
        f"calls       {calls}",
        f"newest call {_moment(found.newest) if found.newest else '-'}",
        f"leases      {found.leases}",
        f"events      {found.events}",
        f"integrity   {found.wrong or 'ok'}",
    ]


def _moment(at: float) -> str:
    ago = max(0.0, time.time() - at)
    return f"{stamp(at)} ({format_duration(ago)} ago)"


def _document(found: copies.Facts) -> Mapping[str, Any]:
    return {
        "path": found.path,
        "hub": found.hub,
        "state_id": found.state_id,
        "home": found.home or None,
        "schema": found.schema,
        "size": found.size,
        "calls": dict(found.calls),
        "newest_call": stamp(found.newest) if found.newest else None,
        "leases": found.leases,
        "events": found.events,
        "integrity": found.wrong or "ok",
    }
