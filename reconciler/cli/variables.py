"""vars: which variables a VM has, and where each comes from."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from reconciler.cli import options, tables
from reconciler.core.errors import Exit, InputError, UsageError, nearest

if TYPE_CHECKING:
    from reconciler.core.variables import Variable

WIDE = 60
"""Characters of a value that are shown in the table."""


@click.command("vars")
@click.argument("vm", metavar="VM")
@options.specs
@options.extra_vars
@options.output("text", "json")
@click.pass_obj
def variables(
    config: str | None, vm: str, files: tuple[str, ...], extra: tuple[str, ...], output: str
) -> int:
    """Show the variables of a VM: each value, where it comes from, and what it hides.

    The weakest first: group_vars/all, group_vars of its groups, host_vars, vars of the file,
    vars_files, vars of the VM, the item of a loop, -e.
    """
    from reconciler.core.plan import FORMAT_VERSION
    from reconciler.loop import load_settings, load_source

    settings = load_settings(config, os.environ)
    source = load_source(files, settings, extra=options.extra_texts(extra), explain=vm)
    if source.explained is None:
        wrong = [one for one in source.specs.diagnostics if one.severity == "error"]
        about = [one for one in wrong if one.vm == vm] or wrong
        if about:
            error = InputError(about)
            error.sources.update(source.lines)
            raise error
        known = [one.spec.name for one in source.specs.vms]
        raise UsageError(f"no spec that is read here declares a VM {vm!r}{nearest(vm, known)}")
    if output == "json":
        found = [_json(one) for one in source.explained]
        options.print_json({"format_version": FORMAT_VERSION, "vm": vm, "vars": found})
    else:
        rows = [(one.name, _value(one), _origin(one)) for one in source.explained]
        for line in tables.table(rows, ("NAME", "VALUE", "FROM"), tables.limit(sys.stdout)):
            click.echo(line)
    return Exit.ERROR if any(one.error for one in source.explained) else Exit.OK


def _value(one: Variable) -> str:
    if one.error:
        return f"error: {one.error}"
    text = json.dumps(one.value, ensure_ascii=False)
    return text if len(text) <= WIDE else f"{text[: WIDE - 1]}…"


def _origin(one: Variable) -> str:
    if one.place is None:
        return one.origin
    place = f"{one.place.file}:{one.place.line}"
    here = (
        place
        if one.origin in place or one.place.file.startswith("-e")
        else (f"{one.origin}, {place}")
    )
    if not one.under:
        return here
    under = ", ".join(f"{place.file}:{place.line}" for _, place in one.under)
    return f"{here} (over {under})"


def _json(one: Variable) -> dict[str, Any]:
    def at(origin: str, place: Any) -> dict[str, Any]:
        return {
            "origin": origin,
            "file": place.file if place else None,
            "line": place.line if place else None,
        }

    return {
        "name": one.name,
        "value": one.value,
        **at(one.origin, one.place),
        "over": [at(origin, place) for origin, place in one.under],
        "error": one.error,
    }
