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
from reconciler.core.chains import Backup, Chain, chains_of, document, in_order, taken
from reconciler.core.errors import Exit, nearest
from reconciler.core.ledger import VERIFY, Ledger
from reconciler.core.plan import FORMAT_VERSION
from reconciler.core.proofs import Finding
from reconciler.core.proofs import stands as proved
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
    there = [chain for chain in chains if chain.kept]
    count, gone = sum(len(chain.kept) for chain in there), len(chains) - len(there)
    head = f"{vm}   {len(there)} chain{'s' if len(there) != 1 else ''}, "
    head += f"{count} backup{'s' if count != 1 else ''}, {taken(there)}"
    head += f"; {gone} more of which nothing is kept" if gone else ""
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
        format_size(takes) if takes is not None else "unknown" if one.kept else "-",
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
    return proved(one.proofs.get(VERIFY))


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

    Each header is looked at, and each image's tables are checked by qemu-img; what an image holds
    is compared with --digests alone, so damage that was found with it stays until it is looked at
    with it again. What was found is written down: nothing is built on an image that is damaged.
    Exit 1 if the backup cannot be restored.
    """
    from reconciler.cli.applying import Session
    from reconciler.loop import load_settings
    from reconciler.orders import Prove
    from reconciler.verifying import chosen
    from reconciler.verifying import verify as looked_at

    settings = load_settings(config, os.environ)
    ledger, vm = known(Path(settings.state), vm)
    backups = chosen(chains_of(ledger, vm), ledger.runs(vm), vm, run or "")
    looks: list[Verified] = []
    found: list[Known] = []
    for one in looked_at(settings, backups, digests=digests):
        looks.append(one)
        found.append((one.backup, one.known(time.time())))
        if output == "text":
            for line in _verified_lines(*found[-1], digests=digests):
                options.say(line)
    now = time.time()
    proofs = tuple(one.proof(now, "") for one in looks if not one.backup.removed)
    Session(settings, "reconciler verify", lock_timeout).order(Prove(vms=(vm,), proofs=proofs))
    name, disks = backups[-1].run, [disk for _, disks in found for disk in disks]
    bad = [disk for disk in disks if disk.wrong]
    images = f"{len(disks)} image{'s' if len(disks) != 1 else ''}"
    following = f"reconciler backup {vm} --run NEW --type full" if bad else ""
    if output == "json":
        options.print_json(verified_document(ledger.hub, vm, found, following))
    elif not bad:
        options.say(f"run {name} of {vm}: {_verdict(disks, images, vm, name)}")
    else:
        # Where it is only remembered, a deeper look may find that it was mended.
        kept = not digests and not any(disk.wrong for one in looks for disk in one.disks)
        mended = f"where it was mended: reconciler verify {vm} --run {name} --digests; "
        options.say(
            f"run {name} of {vm} cannot be restored: {len(bad)} of {images} not well; nothing is "
            f"built on it; {mended if kept else ''}next: {following}",
            error=True,
        )
    return Exit.ERROR if bad else Exit.OK


Known = tuple[Backup, tuple[Finding, ...]]
"""A backup, and what is known of its own images."""


def _verdict(disks: Sequence[Finding], images: str, vm: str, run: str) -> str:
    """How well a backup is proved in which nothing was found wrong by this look."""
    without = [disk for disk in disks if disk.digest == "none was taken"]
    if all(disk.digest == "same" for disk in disks):
        return f"digests verified: {images} as published"
    if without:
        few = "" if len(without) == len(disks) else f" of {len(without)}"
        return f"tables checked: {images}; no digest{few} was taken when it was published"
    return (
        f"tables checked: {images} without a fault; what they hold was not compared: "
        f"reconciler verify {vm} --run {run} --digests"
    )


def verified_document(hub: str, vm: str, found: Sequence[Known], following: str) -> dict[str, Any]:
    """What was found, as `verify -o json` prints it."""
    return {
        "format_version": FORMAT_VERSION,
        "hub": hub,
        "vm": vm,
        "run": found[-1][0].run,
        "ok": not following,
        "backups": [
            {
                "run": backup.run,
                "job_id": backup.call.job_id,
                "ok": not any(disk.wrong for disk in disks),
                "disks": [
                    {
                        "key": disk.key,
                        "image": disk.image,
                        "wrong": list(disk.wrong),
                        "found": stamp(disk.at),
                        "digest": disk.digest or None,
                        "digested": stamp(disk.digested) if disk.digested else None,
                    }
                    for disk in disks
                ],
            }
            for backup, disks in found
        ],
        "next": following or None,
    }


def _verified_lines(backup: Backup, disks: Sequence[Finding], *, digests: bool) -> Iterator[str]:
    for disk in disks:
        mark = "not well" if disk.wrong else "well" if disk.digest == "same" else "tables well"
        digest = f", digest: {disk.digest}" if disk.digest else ""
        yield f"run {backup.run}, disk {disk.key}: {mark}{digest}   {disk.image}"
        kept = disk.wrong and disk.deep and not digests
        since = f" (found with --digests at {stamp(disk.at)})" if kept else ""
        for why in disk.wrong:
            yield f"    {why}{since}"
