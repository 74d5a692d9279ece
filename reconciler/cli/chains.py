"""chain, verify: what the backups of a VM are built on. `chain` is light, as `history` is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reconciler.cli import options, tables
from reconciler.cli.looking import directory
from reconciler.core.chains import Backup, Chain, chains_of, document, in_order
from reconciler.core.errors import Exit, nearest
from reconciler.core.ledger import Ledger
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.units import format_size, stamp
from reconciler.host import store

if TYPE_CHECKING:
    from reconciler.verifying import Verified


@click.command()
@click.argument("vm", metavar="VM")
@click.option("--disk", "key", type=click.IntRange(min=0), metavar="KEY", help="Only this disk.")
@options.output("text", "json")
@click.pass_obj
def chain(config: str | None, vm: str, key: int | None, output: str) -> None:
    """What each backup of a VM is built on, what it takes, and whether it can be restored.

    As the ledger knows it; `verify` looks at the images themselves.
    """
    ledger, vm = known(directory(config), vm)
    found = chains_of(ledger, vm, key)
    if key is not None and not found:
        keys = {e.key for call in ledger.runs(vm) for e in call.exports}
        listed = ", ".join(map(str, sorted(keys))) or "none"
        raise click.UsageError(f"no backup of {vm} has a disk {key} (its disks: {listed})")
    if output == "json":
        options.print_json(document(vm, found, ledger.hub))
    elif found:
        click.echo(_text(vm, found, colour=tables.coloured(sys.stdout)))
    else:
        click.echo(f"No run of {vm} is completed.")


def known(state: Path, vm: str) -> tuple[Ledger, str]:
    """The ledger, and the context of a VM that it knows. Raises UsageError."""
    ledger = store.read(state)
    names = ledger.known if ledger else frozenset()
    vm = ledger.context(vm, names) if ledger else vm
    if ledger is None or vm not in names:
        hint = nearest(vm, names) or f" (known here: {tables.some(sorted(names)) or 'none'})"
        raise click.UsageError(f"this hub never applied a VM {vm!r}{hint}")
    return ledger, vm


def _text(vm: str, chains: Sequence[Chain], *, colour: bool) -> str:
    """A line per backup, each below what it is built on, and what is to be said of it."""
    heads = ["RUN", "TYPE", "ENDED", "DISKS", "SIZE", "TAKES", "STANDS"]
    backups = [pair for chain in chains for pair in in_order(chain)]
    lines = tables.table(
        [_row(depth, one) for depth, one in backups], heads, tables.limit(sys.stdout)
    )
    count = sum(len(chain.kept) for chain in chains)
    takes = format_size(sum(chain.allocated for chain in chains))
    head = f"{vm}   {len(chains)} chain{'s' if len(chains) != 1 else ''}, "
    head += f"{count} backup{'s' if count != 1 else ''}, {takes}"
    out = [
        head,
        tables.paint(lines[0], None, colour, bold=True),
    ]
    for line, (_, one) in zip(lines[1:], backups, strict=True):
        good = not one.lacks or not one.completed
        out.append(line if good else tables.paint(line, "yellow", colour))
        if one.base:
            out.append(f"    built on {one.base}, which no run of this VM has written")
        if one.completed and one.lacks and not one.removed:
            out.append(f"    cannot be restored: {one.lacks}")
    return "\n".join(out)


def _row(depth: int, one: Backup) -> list[str]:
    takes = one.allocated
    return [
        f"{'  ' * depth}{one.run}",
        one.call.type,
        stamp(one.ended) if one.completed else "-",
        str(len(one.disks)),
        format_size(one.size),
        "-" if takes is None else format_size(takes),
        stands(one),
    ]


def stands(one: Backup) -> str:
    """In a word or two."""
    if one.removed:
        return "removed"
    if not one.completed:
        return str(one.call.state)
    if one.lacks:
        return "broken"
    proof = one.proofs.get("verify")
    return f"verified {stamp(proof.at)}" if proof else "not verified"


@click.command()
@click.argument("vm", metavar="VM")
@click.option("--run", metavar="RUN", help="The backup that is meant. [default: the newest]")
@click.option("--digests", is_flag=True, help="Also read every image, and compare its digest.")
@options.lock_timeout
@options.output("text", "json")
@options.quiet
@click.pass_obj
def verify(
    config: str | None, vm: str, run: str | None, digests: bool, lock_timeout: float, output: str
) -> int:
    """Check every image that a backup needs: its own, and all below them.

    Each header is looked at, and each image checked by qemu-img. What was found is written down:
    nothing is built on an image that is damaged. Exit 1 if the backup cannot be restored.
    """
    from reconciler.cli.applying import Session
    from reconciler.loop import load_settings
    from reconciler.orders import Prove
    from reconciler.verifying import chosen
    from reconciler.verifying import verify as looked_at

    settings = load_settings(config, os.environ)
    ledger, vm = known(Path(settings.state), vm)
    backups = chosen(chains_of(ledger, vm), vm, run or "")
    found: list[Verified] = []
    for one in looked_at(settings, backups, digests=digests):
        found.append(one)
        if output == "text":
            for line in _verified_lines(one):
                options.say(line)
    now = time.time()
    proofs = tuple(one.proof(now, "") for one in found if not one.backup.removed)
    Session(settings, "reconciler verify", lock_timeout).order(Prove(vms=(vm,), proofs=proofs))
    ok = all(one.ok for one in found)
    name, count = backups[-1].run, sum(len(one.disks) for one in found)
    images = f"{count} image{'s' if count != 1 else ''}"
    following = "" if ok else f"reconciler backup {vm} --run NEW --type full"
    if output == "json":
        options.print_json(verified_document(ledger.hub, vm, found, following))
    elif ok:
        options.say(f"run {name} of {vm} is whole: {images} looked at")
    else:
        bad = sum(bool(disk.wrong) for one in found for disk in one.disks)
        options.say(
            f"run {name} of {vm} cannot be restored: {bad} of {images} not well; nothing is built "
            f"on it; next: {following}",
            error=True,
        )
    return Exit.OK if ok else Exit.ERROR


def verified_document(
    hub: str, vm: str, found: Sequence[Verified], following: str
) -> dict[str, Any]:
    """What was found, as `verify -o json` prints it."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "vm": vm,
        "run": found[-1].backup.run,
        "ok": not following,
        "backups": [
            {
                "run": one.backup.run,
                "job_id": one.backup.call.job_id,
                "ok": one.ok,
                "disks": [
                    {
                        "key": str(disk.key),
                        "image": disk.image,
                        "wrong": list(disk.wrong),
                        "digest": disk.digest or None,
                    }
                    for disk in one.disks
                ],
            }
            for one in found
        ],
        "next": following or None,
    }


def _verified_lines(one: Verified) -> Iterator[str]:
    for disk in one.disks:
        mark = "not well" if disk.wrong else "well"
        digest = f", digest: {disk.digest}" if disk.digest else ""
        yield f"run {one.backup.run}, disk {disk.key}: {mark}{digest}   {disk.image}"
        for why in disk.wrong:
            yield f"    {why}"
