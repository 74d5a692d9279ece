"""schema: what may be written, for editors."""

from __future__ import annotations

import click

from reconciler.cli import options
from reconciler.core.errors import Exit

KINDS = ("spec", "config", "inventory")


@click.command()
@click.argument("kind", type=click.Choice(KINDS), default="spec", metavar="[spec|config|inventory]")
def schema(kind: str) -> int:
    """Print a JSON Schema (draft-07) of specs, of the configuration or of an inventory file.

    For editors: with a first line `# yaml-language-server: $schema=spec.schema.json` in a file,
    they complete keys, and mark what is wrong while it is typed.
    """
    from reconciler.core.schema import schema as made

    options.print_json(made(kind))
    return Exit.OK
