"""validate, plan, diff."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from reconciler import __version__
from reconciler.cli import options, tables, text
from reconciler.core.errors import Exit

if TYPE_CHECKING:
    from reconciler.core.errors import Diagnostic
    from reconciler.core.plan import Plan


@click.command()
@options.specs
@options.extra_vars
@click.option("--all", "everything", is_flag=True, help="Show more than 20 of one kind.")
@options.output("text", "json", "sarif")
@options.quiet
@click.pass_obj
def validate(
    config: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    everything: bool,
    output: str,
) -> int:
    """Check specs, inventory and config; change nothing.

    Every finding of every file is shown, with file, line and column. Exit 65 if one is an error.
    """
    from reconciler.core.desired import build
    from reconciler.core.findings import in_order
    from reconciler.core.plan import FORMAT_VERSION, diagnostics_json
    from reconciler.loop import current, load_settings, load_source

    settings = load_settings(config, os.environ)
    source = load_source(files, settings, extra=options.extra_texts(extra))
    desired = build(source.specs, source.inventory, settings, current(settings))
    more = source.inventory.findings if source.inventory else []  # of VMs that no spec is about
    found = in_order((*desired.diagnostics, *more))
    if output == "json":
        rows = diagnostics_json(found, source.lines)
        options.print_json({"format_version": FORMAT_VERSION, "diagnostics": rows})
    elif output == "sarif":
        from reconciler.core.sarif import log

        options.print_json(log(found, source.lines, __version__, os.getcwd()))
    else:
        _print(found, source.lines, each=None if everything else text.EACH)
        count = len(desired.vms)
        options.say(f"{count} VM{'s' if count != 1 else ''} valid, {text.count(found)}.")
    return Exit.INVALID if desired.failed else Exit.OK


def _print(
    found: Sequence[Diagnostic], sources: Mapping[str, str], *, each: int | None = text.EACH
) -> None:
    quiet = options.Manner.quiet
    if quiet:
        found = [one for one in found if one.severity == "error"]
    out = sys.stderr if quiet else sys.stdout
    width, colour = tables.width_of(out), tables.coloured(out)
    for line in text.findings(found, sources, colour=colour, width=width, each=each):
        click.echo(line, err=quiet)


def _plan(
    config: str | None, files: tuple[str, ...], extra: tuple[str, ...], prune: bool
) -> tuple[Plan, Mapping[str, str]]:
    """The plan, and the texts of the files that it comes from."""
    from reconciler.loop import desire, dry_run, load_settings, load_source, pruned

    settings = load_settings(config, os.environ)
    source = load_source(files, settings, extra=options.extra_texts(extra))
    wanted = desire(source, settings)
    return dry_run(settings, pruned(wanted) if prune else wanted, os.environ), source.lines


def _show(planned: Plan, sources: Mapping[str, str], output: str, detailed: bool) -> int:
    from reconciler.core.plan import diagnostics_json

    if output == "json":
        rows = diagnostics_json(planned.diagnostics, sources)
        options.print_json({**planned.to_json(), "diagnostics": rows})
    elif options.Manner.quiet:
        _print(planned.diagnostics, sources)
    else:
        colour = tables.coloured(sys.stdout)
        click.echo(text.plan_text(planned, colour=colour, sources=sources))
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
@options.quiet
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
    return _show(*_plan(config, files, extra, prune), output, detailed_exitcode)


@click.command()
@options.specs
@options.extra_vars
@options.output("text", "json")
@_PRUNE
@options.quiet
@click.pass_obj
def diff(
    config: str | None, files: tuple[str, ...], extra: tuple[str, ...], output: str, prune: bool
) -> int:
    """The plan; exit 0 if there is nothing to do, 2 if there is."""
    return _show(*_plan(config, files, extra, prune), output, True)
