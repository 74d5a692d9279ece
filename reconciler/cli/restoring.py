"""restore-test: read a backup back."""

from __future__ import annotations

import json
import os
import posixpath
import time

import click

from reconciler.cli import options
from reconciler.cli.applying import Session
from reconciler.core.call import Call
from reconciler.core.contents import RestoreTest, lines
from reconciler.core.errors import Exit, UsageError
from reconciler.core.ledger import RESTORE, Proof
from reconciler.core.units import parse_size
from reconciler.loop import current, load_settings
from reconciler.orders import Prove
from reconciler.restoring import Order, run_of
from reconciler.restoring import restore_test as read_back


@click.command(name="restore-test")
@click.argument("vm", metavar="VM")
@click.option("--run", metavar="RUN", help="Which run. [default: the newest that is completed]")
@click.option(
    "--file", "path", metavar="PATH", help="The file to read back. [default: the first there is]"
)
@click.option("--disk", type=int, metavar="KEY", help="Only this disk.")
@click.option(
    "--with",
    "tool",
    type=click.Choice(["tools", "guestfish"]),
    default="tools",
    show_default=True,
    help="Their own tools read the file systems; or libguestfs, which boots a kernel for that.",
)
@click.option(
    "--copy-limit",
    metavar="SIZE",
    default="4GiB",
    show_default=True,
    help="How much may be copied to the directory of temporary files, where FUSE cannot be had.",
)
@click.option(
    "--timeout",
    type=options.Duration(),
    default="10m",
    show_default=True,
    help="How long all of it may take.",
)
@options.lock_timeout
@options.output("text", "json")
@options.quiet
@click.pass_obj
def restore_test(
    config: str | None,
    vm: str,
    run: str | None,
    path: str | None,
    disk: int | None,
    tool: str,
    copy_limit: str,
    timeout: float,
    lock_timeout: float,
    output: str,
) -> int:
    """Read a backup back: partition tables, file systems, and a file of each.

    It boots nothing, mounts nothing and writes nothing; it takes no port, and disturbs no backup.
    What was found is kept with the run, and history shows it. Exit code 1: something of it cannot
    be read.
    """
    order = Order(
        file=_path(path),
        disk=disk,
        guestfish=tool == "guestfish",
        copy_limit=_size(copy_limit),
        timeout=timeout,
    )
    settings = load_settings(config, os.environ)
    call = run_of(current(settings), vm, run)
    found = read_back(settings, call, order)
    _show(found, call, output)
    session = Session(settings, "reconciler restore-test", lock_timeout, quiet=output == "json")
    proof = Proof(
        job_id=call.job_id,
        kind=RESTORE,
        at=time.time(),
        ok=found.ok,
        result=json.dumps(found.to_json(), ensure_ascii=False),
        who="",
    )
    session.order(Prove(vms=(vm,), proofs=(proof,)))
    return Exit.OK if found.ok else Exit.ERROR


def _path(written: str | None) -> str:
    if written is None:
        return ""
    if not written.startswith("/") or posixpath.normpath(written) == "/":
        raise UsageError(f"--file {written!r}: write its path from the root of its file system")
    return posixpath.normpath(written)


def _size(written: str) -> int:
    try:
        return parse_size(written)
    except ValueError as error:
        raise UsageError(f"--copy-limit: {error}") from error


def _show(found: RestoreTest, call: Call, output: str) -> None:
    if output == "json":
        options.print_json(found.to_json())
        return
    options.say(f"{found.vm}, run {found.run} ({call.type}):")
    for line in lines(found):
        options.say(line)
    if found.ok:
        options.say(f"ok: {found.summary}")
        return
    for problem in found.problems:
        options.say(f"failed: {problem}", error=True)
    options.say(f"next: reconciler verify {found.vm} --run {found.run}", error=True)
