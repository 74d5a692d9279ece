"""render: files for other programs, made from the config."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import click

from reconciler.cli import render_tunnel, rendering
from reconciler.cli.rendering import CREDENTIALS, inside
from reconciler.core.errors import Exit
from reconciler.core.settings import Settings, below
from reconciler.host.files import config_path

UNITS: Final = ("reconciler.service", "reconciler.socket")
_STATES: Final = "/var/lib"
"""What `StateDirectory=` is below. Source: systemd.exec(5)."""


@click.group()
def render() -> None:
    """Print files for other programs, made from the config."""


@render.command()
@click.option("--user", default="reconciler", show_default=True, help="Who it runs as; not root.")
@click.option("--group", help="[default: the user's name]")
@click.option(
    "--directory", metavar="DIR", help="What it watches. [default: /etc/reconciler/specs]"
)
@click.option(
    "--repository",
    "repositories",
    multiple=True,
    metavar="PATH",
    help="Where it may write beside the config's repositories; repeatable.",
)
@click.option("--output", type=click.Path(file_okay=False), help="Write the units there instead.")
@click.pass_obj
def systemd(
    config: str | None,
    user: str,
    group: str | None,
    directory: str | None,
    repositories: tuple[str, ...],
    output: str | None,
) -> int:
    """Print reconciler.service and reconciler.socket for the config that holds here.

    The daemon runs as a user of its own with no more rights than it needs, servers outlive it, and
    callbacks wait while it is restarted.
    """
    from reconciler.loop import load_settings

    path = config_path(config, os.environ)
    # As the unit will have them: not by this user's home, or what this shell has set.
    settings = load_settings(path, {"STATE_DIRECTORY": f"{_STATES}/reconciler"})
    if directory and settings.git.url:
        raise click.UsageError("the config has `git: {url: …}`, so no --directory is watched")
    values = _values(settings, path, user, group or user, directory, repositories)
    units = {name: rendering.rendered(name, values) for name in UNITS}
    rendering.warn_unseen([*values["command"], *values["writable"], *values["readable"]])
    rendering.given(units, output)
    return Exit.OK


render.add_command(render_tunnel.sshd)
render.add_command(render_tunnel.tunnel)


def _values(
    settings: Settings,
    config: str | None,
    user: str,
    group: str,
    directory: str | None,
    repositories: Sequence[str],
) -> dict[str, Any]:
    """What the templates are filled with."""
    watched = None if settings.git.url else os.path.abspath(directory or "/etc/reconciler/specs")
    config = os.path.abspath(config) if config else None
    state_name = _state_name(settings.state)
    roots = sorted({*settings.repositories.values(), *map(os.path.abspath, repositories)})
    outside = roots if state_name else [settings.state, *roots]
    inventory = [settings.inventory] if settings.inventory else []
    if settings.inventory_sql and settings.inventory_sql.url.startswith("sqlite://"):
        inventory = [unquote(settings.inventory_sql.url.removeprefix("sqlite://"))]
    read = [path for path in (config, watched, *inventory) if path]
    return {
        "hub": settings.hub,
        "user": user,
        "group": group,
        "command": [
            *_ourselves(),
            *(["--config", config] if config else []),
            "watch",
            *([watched] if watched else []),
        ],
        "state_name": state_name,
        "writable": [root for root in outside if not (state_name and inside(settings.state, root))],
        "readable": [path for path in read if any(inside(root, path) for root in outside)],
        "mounts": [root for root in roots if not inside(settings.state, root)],
        "credentials": sorted({ref.name for ref in settings.secrets if ref.kind == "credential"}),
        "credential_directory": CREDENTIALS,
        "listen": str(settings.listen).replace("localhost", "127.0.0.1"),
    }


def _state_name(state: str) -> str:
    """The state directory as `StateDirectory=` names it; empty: it is elsewhere."""
    return state.removeprefix(f"{_STATES}/") if below(_STATES, state) else ""


def _ourselves() -> list[str]:
    """The command, by its absolute path."""
    found = shutil.which(sys.argv[0]) if sys.argv[0] else None
    if found and Path(found).name == "reconciler":
        return [os.path.abspath(found)]
    beside = Path(sys.executable).with_name("reconciler")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "reconciler"]
