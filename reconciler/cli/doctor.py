"""doctor: what the hub needs, looked at and tried."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from reconciler.cli import options, tables

if TYPE_CHECKING:
    from reconciler.core.doctor import Check

COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "unknown": "cyan"}


@click.command()
@click.option(
    "--only",
    metavar="GROUP,…",
    default="",
    help="Some groups of checks: python, qemu, ports, repository, state, sna, tunnel, secrets, …",
)
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE|DIR",
    help="Specs whose tunnels are looked at, beside those that were applied. [default: specs/]",
)
@options.output("text", "json")
@click.pass_obj
def doctor(config: str | None, only: str, files: tuple[str, ...], output: str) -> int:
    """Look at and try what this hub needs, and say what helps where something is wrong.

    Nothing stays that it makes, and it works beside everything else. Exit 0 if nothing failed
    (warnings do not count), 1 if something did, 78 if the config cannot be read; then it tries what
    can be tried without.
    """
    from reconciler.core.doctor import GROUPS, document, exit_code
    from reconciler.core.errors import ConfigError, nearest
    from reconciler.doctor import Doctor
    from reconciler.host.files import config_path
    from reconciler.loop import load_settings

    groups = [one.strip() for one in only.split(",") if one.strip()] or list(GROUPS)
    for one in groups:
        if one not in GROUPS:
            known = ", ".join(GROUPS)
            raise click.UsageError(f"there is no group {one!r}{nearest(one, GROUPS)}: {known}")
    settings, trouble = None, None
    try:
        settings = load_settings(config, os.environ)
    except ConfigError as error:
        trouble = error
        groups = ["config", *groups]
    path = config_path(config, os.environ)
    checks = Doctor(settings, os.environ, config=path, trouble=trouble, specs=files).checks(groups)
    if output == "json":
        options.print_json(document(settings.hub if settings else None, checks))
    else:
        for line in _lines(checks, colour=tables.coloured(sys.stdout)):
            click.echo(line)
    return exit_code(checks)


def _lines(checks: list[Check], *, colour: bool) -> list[str]:
    wide = max((len(one.title) for one in checks), default=0)
    lines = []
    for one in checks:
        word = tables.paint(f"{one.status:<8}", COLOURS[one.status], colour)
        lines.append(f"{word} {one.title:<{wide}}   {one.observed}")
        if one.fix:
            lines.append(f"{'':<8} {'':<{wide}}   fix: {one.fix}")
    counts = {word: sum(one.status == word for one in checks) for word in COLOURS}
    told = {"unknown": "cannot be told"}
    parts = [f"{many} {told.get(word, word)}" for word, many in counts.items() if many]
    return [*lines, "", ", ".join(parts) + "."]
