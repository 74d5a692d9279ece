"""init: the files of a new hub."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final

import click

from reconciler.core.errors import Exit

FILES: Final = {
    "reconciler.yaml": "init-config.yaml",
    "inventory.yaml": "init-inventory.yaml",
    "specs/first.yaml": "init-spec.yaml",
}
"""What is written → its template."""


@click.command()
@click.argument("directory", default=".", metavar="[DIR]")
@click.option("--hub", metavar="NAME", help="The hub's name. [default: the host's]")
@click.pass_obj
def init(config: str | None, directory: str, hub: str | None) -> int:
    """Write the files of a new hub into DIR: a config, an inventory and a first spec.

    They work as they stand after two edits, which are marked in them. What is there is never
    overwritten: then nothing is written at all.
    """
    from reconciler.core.config import default_hub
    from reconciler.core.spec import checked_name
    from reconciler.host.fresh import write

    try:
        name = checked_name(hub) if hub else default_hub(os.uname().nodename)
    except ValueError as error:
        raise click.UsageError(f"--hub: {error}") from None
    where = Path(directory)
    write({where / path: _rendered(template, name) for path, template in FILES.items()})
    for path in FILES:
        click.echo(f"wrote {where / path}")
    for line in _next(directory, config):
        click.echo(line)
    return Exit.OK


def _rendered(name: str, hub: str) -> str:
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 no HTML; the name is one that is safe anywhere
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(f"{name}.j2").render(hub=hub)


def _next(directory: str, config: str | None) -> list[str]:
    """What to type now."""
    steps = [
        "edit reconciler.yaml    the vCenter: EDIT 1",
        "edit inventory.yaml     the VM and its disks: EDIT 2",
        "(umask 077; cat > password)    the vCenter's password, then Ctrl-D",
        "reconciler doctor       what this hub needs, and has not",
        "reconciler plan         what would be done",
        "reconciler apply        do it",
    ]
    if os.path.realpath(directory) != os.path.realpath("."):
        steps.insert(0, f"cd {shlex.quote(directory)}")
    if named := config or os.environ.get("RECONCILER_CONFIG"):
        steps.insert(0, f"unset RECONCILER_CONFIG    or {named} is used, not these files")
    return ["next:", *(f"  {step}" for step in steps)]
