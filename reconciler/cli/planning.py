"""validate, plan, diff."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from reconciler.cli import options, tables, text
from reconciler.core.errors import Exit

if TYPE_CHECKING:
    from reconciler.core.plan import Plan


@click.command()
@options.specs
@options.extra_vars
@options.output("text", "json")
@click.pass_obj
def validate(
    config: str | None, files: tuple[str, ...], extra: tuple[str, ...], output: str
) -> int:
    """Check specs, inventory and config; change nothing.

    Every finding of every file is shown, with file, line and column. Exit 65 if one is an error.
    """
    from reconciler.core.desired import build
    from reconciler.core.plan import FORMAT_VERSION, diagnostics_json
    from reconciler.loop import current, load_settings, load_source

    settings = load_settings(config, os.environ)
    source = load_source(files, settings, extra=options.extra_texts(extra))
    desired = build(source.specs, source.inventory, settings, current(settings))
    found = desired.diagnostics
    if output == "json":
        options.print_json(
            {"format_version": FORMAT_VERSION, "diagnostics": diagnostics_json(found)}
        )
    else:
        for line in text.findings(found, colour=tables.coloured(sys.stdout)):
            click.echo(line)
        errors = sum(one.severity == "error" for one in found)
        warnings = len(found) - errors
        count = len(desired.vms)
        click.echo(
            f"{count} VM{'s' if count != 1 else ''} valid, {errors} error"
            f"{'s' if errors != 1 else ''}, {warnings} warning{'s' if warnings != 1 else ''}."
        )
    return Exit.INVALID if desired.failed else Exit.OK


def _plan(config: str | None, files: tuple[str, ...], extra: tuple[str, ...], prune: bool) -> Plan:
    from reconciler.loop import desire, dry_run, load_settings, load_source, pruned

    settings = load_settings(config, os.environ)
    source = load_source(files, settings, extra=options.extra_texts(extra))
    wanted = desire(source, settings)
    return dry_run(settings, pruned(wanted) if prune else wanted, os.environ)


def _show(planned: Plan, output: str, detailed: bool) -> int:
    if output == "json":
        options.print_json(planned.to_json())
    else:
        click.echo(text.plan_text(planned, colour=tables.coloured(sys.stdout)))
    if any(one.severity == "error" for one in planned.diagnostics):
        return Exit.INVALID
    return Exit.CHANGES if detailed and planned.changes else Exit.OK


_PRUNE = click.option(
    "--prune", is_flag=True, help="Also take down what was applied once and no spec names now."
)


@click.command()
@options.specs
@options.extra_vars
@options.output("text", "json")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 if there is something to do.")
@_PRUNE
@click.pass_obj
def plan(
    config: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    output: str,
    detailed_exitcode: bool,
    prune: bool,
) -> int:
    """Show what would be done and why; change nothing.

    \b
    +  create, start     -/+ restart     =  adopt what runs
    -  stop, release     >   call        ~  wait   !  held   x  refused
    """
    return _show(_plan(config, files, extra, prune), output, detailed_exitcode)


@click.command()
@options.specs
@options.extra_vars
@options.output("text", "json")
@_PRUNE
@click.pass_obj
def diff(
    config: str | None, files: tuple[str, ...], extra: tuple[str, ...], output: str, prune: bool
) -> int:
    """The plan; exit 0 if there is nothing to do, 2 if there is."""
    return _show(_plan(config, files, extra, prune), output, True)
