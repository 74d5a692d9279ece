"""render: files for other programs, made from the config."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import click

from reconciler.cli import options
from reconciler.core.errors import Exit, HostError
from reconciler.core.settings import Settings, below
from reconciler.host.files import config_path

if TYPE_CHECKING:
    import jinja2

UNITS: Final = ("reconciler.service", "reconciler.socket")
CREDENTIALS: Final = "/etc/reconciler/credentials"
"""Where secrets wait for systemd to hand them over, root's and readable by nobody else."""
_STATES: Final = "/var/lib"
"""What `StateDirectory=` is below. Source: systemd.exec(5)."""
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 named, not used
"""What a unit with ProtectHome and PrivateTmp does not see."""


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
    units = {name: _rendered(name, values) for name in UNITS}
    for one in _unseen([*values["command"], *values["writable"], *values["readable"]]):
        options.say(
            f"warning: the unit will not see {one}: ProtectHome and PrivateTmp hide "
            f"{', '.join(_HIDDEN)} from it; move it elsewhere, or relax them with "
            "`systemctl edit reconciler`",
            err=True,
        )
    if output is None:
        click.echo("\n".join(f"# {name}\n{text}" for name, text in units.items()), nl=False)
        return Exit.OK
    for name, text in units.items():
        _write(Path(output) / name, text)
    return Exit.OK


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
        "writable": [root for root in outside if not (state_name and _in(settings.state, root))],
        "readable": [path for path in read if any(_in(root, path) for root in outside)],
        "mounts": [root for root in roots if not _in(settings.state, root)],
        "credentials": sorted({ref.name for ref in settings.secrets if ref.kind == "credential"}),
        "credential_directory": CREDENTIALS,
        "listen": str(settings.listen).replace("localhost", "127.0.0.1"),
    }


def _in(root: str, path: str) -> bool:
    return path == root or below(root, path)


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


def _unseen(paths: Iterable[str]) -> list[str]:
    return sorted({one for one in paths if any(_in(hidden, one) for hidden in _HIDDEN)})


def _rendered(name: str, values: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 no HTML; each value goes through a filter of ours
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    _filters(environment)
    return environment.get_template(f"{name}.j2").render(values)


def _filters(environment: jinja2.Environment) -> None:
    environment.filters["text"] = literal
    environment.filters["word"] = word
    environment.filters["argument"] = argument


def literal(text: str) -> str:
    """A value in which nothing is special to systemd. Raises HostError.

    Source: systemd.unit(5), specifiers.
    """
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise HostError(f"cannot write {text!r} into a unit: it holds a control character")
    return text.replace("%", "%%")


def word(text: str) -> str:
    """One word of a list of words. Source: systemd.syntax(7), quoting."""
    plain = literal(text)
    if re.fullmatch(r"[A-Za-z0-9_./:@%+=,-]+", plain):
        return plain
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def argument(text: str) -> str:
    """One word of a command line, where a dollar is special too. Source: systemd.service(5)."""
    return word(text).replace("$", "$$")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error
    options.say(f"wrote {path}", err=True)
