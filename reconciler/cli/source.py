"""approve: what a person says about a revision of the watched directory."""

from __future__ import annotations

import os

import click

from reconciler.cli import options
from reconciler.cli.applying import Session
from reconciler.core.errors import Exit
from reconciler.loop import load_settings
from reconciler.orders import Approve


@click.command()
@click.argument("revision", metavar="REVISION")
@click.option("--reason", default="", help="Why; it is written down.")
@options.lock_timeout
@options.quiet
@click.pass_obj
def approve(config: str | None, revision: str, reason: str, lock_timeout: float) -> int:
    """Let one revision of the watched directory remove more VMs than `loop.max_delete` allows.

    It counts for that revision and no other; `status` names the one that waits. What is protected,
    in use or being written is held all the same.
    """
    settings = load_settings(config, os.environ)
    session = Session(settings, "reconciler approve", lock_timeout)
    for line in session.order(Approve(revision=revision, reason=reason)):
        options.say(line)
    return Exit.OK
