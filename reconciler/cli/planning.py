"""validate, plan, diff, show."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from reconciler import __version__
from reconciler.cli import options, tables, text
from reconciler.core.errors import Exit
from reconciler.core.units import Seconds, format_duration, stamp

if TYPE_CHECKING:
    from reconciler.core.desired import Desired
    from reconciler.core.errors import Diagnostic
    from reconciler.core.plan import Plan
    from reconciler.loop import Source

SAVED: Final[Seconds] = 3600.0
"""How long a saved plan can be applied, if nobody says."""
LONGEST: Final[Seconds] = 366 * 86400.0
"""How long one can be applied at most. What it rests on moves sooner."""


@click.command()
@options.specs
@options.extra_vars
@options.choice
@click.option("--all", "everything", is_flag=True, help="Show more than 20 of one kind.")
@options.output("text", "json", "sarif")
@options.quiet
@click.pass_obj
def validate(
    config: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    selector: str | None,
    patterns: tuple[str, ...],
    everything: bool,
    output: str,
) -> int:
    """Check specs, inventory and config; change nothing.

    Every finding of every file is shown, with file, line and column. Exit 65 if one is an error.
    """
    from reconciler.cli.saving import Question
    from reconciler.core.findings import in_order
    from reconciler.core.plan import FORMAT_VERSION, diagnostics_json
    from reconciler.loop import chosen, current, desire, load_settings

    settings = load_settings(config, os.environ)
    question = Question(files=files, extra=extra, patterns=patterns, selector=selector)
    # Where runs are asked for at the API, the inventory is all that there is to be checked.
    source = question.source(settings, bare=bool(settings.inventory or settings.inventory_sql))
    names = question.chosen(source, settings)
    desired = chosen(desire(source, settings), names)(current(settings))
    more = source.inventory.findings if source.inventory else []  # of VMs that no spec is about
    if names is not None:
        more = [one for one in more if not one.vm or one.vm in names]
    found = in_order((*desired.diagnostics, *more))
    if output == "json":
        rows = diagnostics_json(found, source.lines)
        options.print_json({"format_version": FORMAT_VERSION, "diagnostics": rows})
    elif output == "sarif":
        from reconciler.core.sarif import log

        options.print_json(log(found, source.lines, __version__, os.getcwd()))
    else:
        _print(found, source.lines, each=None if everything else text.EACH)
        options.say(f"{_checked(source, desired)} {text.count(found)}.")
    return Exit.INVALID if desired.failed else Exit.OK


def _checked(source: Source, desired: Desired) -> str:
    """`2 VMs valid,`. Where no spec declares anything, the inventory is what was checked."""
    specs, known = source.specs, source.inventory
    said = f"{text.counted(len(desired.vms), len(desired.tunnels))} valid"
    if specs.vms or specs.tunnels or specs.failed:
        return f"{said},"
    if not specs.runs:
        said = "no VM is declared"
    if known is None or known.stale:
        return f"{said},"
    vms, disks = len(known.vms), sum(len(vm.disks) for vm in known.vms.values())
    return f"{said}; inventory: {vms} VM{'s' * (vms != 1)}, {disks} disk{'s' * (disks != 1)};"


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


def _show(
    planned: Plan, sources: Mapping[str, str], output: str, *, detailed: bool, diff: bool
) -> int:
    """Print a plan; its exit code. `sources`: the texts of the files that it comes from."""
    from reconciler.core.plan import diagnostics_json

    if output == "json":
        from reconciler.core.sides import document

        rows = diagnostics_json(planned.diagnostics, sources)
        value = document(planned) if diff else planned.to_json()
        options.print_json({**value, "diagnostics": rows})
    elif options.Manner.quiet:
        _print(planned.diagnostics, sources)
    else:
        colour = tables.coloured(sys.stdout)
        click.echo(text.plan_text(planned, colour=colour, sources=sources, diff=diff))
    if planned.failed:
        return Exit.INVALID
    return Exit.CHANGES if detailed and planned.changes else Exit.OK


_PRUNE = click.option(
    "--prune", is_flag=True, help="Also take down what was applied once and no spec names now."
)


@click.command()
@options.specs
@options.extra_vars
@options.choice
@options.output("text", "json")
@click.option("--detailed-exitcode", is_flag=True, help="Exit 2 if there is something to do.")
@_PRUNE
@options.quiet
@options.diff
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the plan there; `apply FILE` does exactly this, once.",
)
@click.option(
    "--expires",
    type=options.Duration(),
    help="With --out: for how long it can be applied.  [default: 1h]",
)
@click.pass_obj
def plan(
    config: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    selector: str | None,
    patterns: tuple[str, ...],
    output: str,
    detailed_exitcode: bool,
    prune: bool,
    diff: bool,
    out: Path | None,
    expires: float | None,
) -> int:
    """Show what would be done and why; change nothing.

    \b
    +  create, start     -/+ restart     =  adopt what runs
    -  stop, release     >   call        ~  wait   !  held   x  refused
    """
    if expires is not None and not out:
        raise click.UsageError("--expires goes with --out")
    if expires is not None and not 0 < expires <= LONGEST:
        raise click.UsageError(
            f"--expires must be more than 0 s and at most {format_duration(LONGEST)}"
        )
    from reconciler.cli import saving
    from reconciler.loop import load_settings

    settings = load_settings(config, os.environ)
    question = saving.Question(
        files=files, extra=extra, prune=prune, patterns=patterns, selector=selector
    )
    source = question.source(settings)
    names = question.chosen(source, settings)
    if out:
        saving.refuse_out(out, source)
    basis = question.rehearsed(source, names, settings)
    code = _show(basis.plan, source.lines, output, detailed=detailed_exitcode, diff=diff)
    if out and basis.plan.failed:
        said = f"not saved to {out}: mend what is wrong first, or leave it out by --vm or -l"
        options.say(said, err=True, error=True)
    elif out:
        lasts = SAVED if expires is None else expires
        saved = saving.save(out, question, source, names, settings, basis, lasts)
        options.say(
            f"saved to {out}; until {stamp(saved.expires)} ({format_duration(lasts)}), once: "
            f"reconciler apply {shlex.quote(str(out))}",
            err=True,
        )
    return code


@click.command()
@options.specs
@options.extra_vars
@options.choice
@options.output("text", "json")
@_PRUNE
@options.quiet
@options.diff
@click.pass_obj
def diff(
    config: str | None,
    files: tuple[str, ...],
    extra: tuple[str, ...],
    selector: str | None,
    patterns: tuple[str, ...],
    output: str,
    prune: bool,
    diff: bool,
) -> int:
    """The plan; exit 0 if there is nothing to do, 2 if there is."""
    from reconciler.cli.saving import Question
    from reconciler.loop import load_settings

    settings = load_settings(config, os.environ)
    question = Question(files=files, extra=extra, prune=prune, patterns=patterns, selector=selector)
    source = question.source(settings)
    names = question.chosen(source, settings)
    basis = question.rehearsed(source, names, settings)
    return _show(basis.plan, source.lines, output, detailed=True, diff=diff)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@options.output("text", "json")
@options.diff
@click.pass_obj
def show(config: str | None, file: Path, output: str, diff: bool) -> int:
    """Show a saved plan as `plan` printed it, and whether it was applied; look at nothing else."""
    from reconciler.cli.saving import read, use_of

    promise = read(file)
    saved = promise.saved
    use = use_of(saved)
    options.say(
        f"{file}: made at {stamp(saved.made)} by {saved.who} for hub {saved.hub}, good until "
        f"{stamp(saved.expires)}; "
        + (f"applied at {stamp(use.at)} by {use.who}" if use else "not applied yet"),
        err=True,
    )
    planned = saved.basis.plan
    if output == "text":
        click.echo(text.plan_text(planned, colour=tables.coloured(sys.stdout), diff=diff))
        return Exit.OK
    from reconciler.core.plan import diagnostics_json
    from reconciler.core.sides import document

    value = document(planned) if diff else planned.to_json()
    value["diagnostics"] = diagnostics_json(planned.diagnostics, {})
    value["saved"] = saved.to_json() | {
        "used": {"at": stamp(use.at), "who": use.who} if use else None
    }
    options.print_json(value)
    return Exit.OK
