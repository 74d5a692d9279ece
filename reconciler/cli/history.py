"""history: light, so nothing here imports pydantic, rich, httpx2 or jinja2."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final

import click

from reconciler.cli import options, tables
from reconciler.cli.looking import directory
from reconciler.core.call import Call
from reconciler.core.chains import broken, chains_of
from reconciler.core.errors import nearest
from reconciler.core.history import Proofs, document, duration, ended, proof, runs
from reconciler.core.ledger import VERIFY, Proof
from reconciler.core.units import Seconds, format_duration, stamp
from reconciler.host import store


@click.command()
@click.argument("vm", metavar="VM")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many runs."
)
@options.output("text", "json")
@click.pass_obj
def history(config: str | None, vm: str, limit: int, output: str) -> None:
    """The runs of one VM, newest first: when, by whom, of what, and how they ended."""
    ledger = store.read(directory(config))
    known = ledger.known if ledger else frozenset()
    vm = ledger.context(vm, known) if ledger else vm
    if ledger is None or vm not in known:
        hint = nearest(vm, known) or f" (known here: {tables.some(sorted(known)) or 'none'})"
        raise click.UsageError(f"this hub never applied a VM {vm!r}{hint}")
    found, now = runs(ledger, vm), time.time()
    shown = found[:limit]
    kept = ledger.shelf.of(call.job_id for call in shown)
    proofs = {job: one.proofs for job, one in kept.items()}
    lacking: Mapping[str, str] = {}
    if any(VERIFY in one for one in proofs.values()):
        lacking = broken(chains_of(ledger, vm))
    if output == "json":
        options.print_json(document(vm, shown, len(found), ledger.hub, now, proofs, lacking))
    elif found:
        width = tables.limit(sys.stdout)
        colour = tables.coloured(sys.stdout)
        click.echo(_text(shown, proofs, lacking, now, colour=colour, width=width))
        if len(found) > limit:
            click.echo(f"{len(found) - limit} older: --limit {len(found)} shows all")
    else:
        click.echo(f"No run of {vm} was ever asked for.")


def _text(
    shown: Sequence[Call],
    proofs: Proofs,
    lacking: Mapping[str, str],
    now: Seconds,
    *,
    colour: bool,
    width: int | None = None,
) -> str:
    """A line per run, and below it what is too long for one."""
    heads = ["RUN", "TYPE", "STATE", "ASKED", "CALLED", "ENDED", "TOOK", "WHO"]
    lines = tables.table([_row(call, now) for call in shown], heads, width)
    out = [tables.paint(lines[0], None, colour, bold=True)]
    for line, call in zip(lines[1:], shown, strict=True):
        out.append(line)
        if call.message:
            out.append(f"    {call.message}")
        out += [f"    full instead of incremental: {call.fallback}"] if call.fallback else []
        out += [f"    implausible: {call.doubt}"] if call.doubt else []
        out.append(f"    job {call.job_id} at SNA {call.sna}")
        if call.targets:
            out.append(f"    targets {call.targets}")
        lacks = lacking.get(call.job_id, "")
        out += [f"    {_proof(one, lacks)}" for one in proofs.get(call.job_id, {}).values()]
    return "\n".join(out)


_KINDS: Final = {"restore": "restore test", "verify": "verify"}


def _proof(found: Proof, lacks: str) -> str:
    said = proof(found, lacks)
    verdict = "ok" if said["ok"] else "FAILED"
    summary = f": {said['summary']}" if said["summary"] else ""
    return f"{_KINDS[found.kind]} {verdict} {said['at']}{summary}, by {found.who}"


def _row(call: Call, now: Seconds) -> list[str]:
    again = f" (attempt {call.attempt})" if call.attempt > 1 else ""
    span, end = duration(call, now), ended(call)
    so_far = " so far" if end is None else ""
    return [
        f"{call.run}{again}",
        call.type,
        str(call.state) + (", tainted" if call.tainted else ""),
        stamp(call.created),
        stamp(call.called) if call.called else "-",
        "-" if end is None else stamp(end),
        "-" if span is None else f"{format_duration(span)}{so_far}",
        call.who or "-",
    ]
