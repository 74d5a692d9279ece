"""tunnel trust: say which host key is the hub's."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

import click

from reconciler.cli import options
from reconciler.core.errors import Exit, HostError, UsageError
from reconciler.core.units import Port, Seconds

if TYPE_CHECKING:
    from reconciler.core.trust import Verdict
    from reconciler.core.tunnel import HostKey, Tunnel

DEADLINE: Final[Seconds] = 5.0
"""For each connection to the hub; there is one per kind of key."""
PORT: Final[Port] = 443
"""Where a hub's sshd is, if nobody says. Source: Sendense, October 2025."""


@click.group()
def tunnel() -> None:
    """The SSH tunnels of an appliance.

    \b
    reconciler tunnel trust NAME     say which host key is the hub's
    reconciler apply                 dial what the specs declare
    reconciler status                how they stand
    """


@tunnel.command()
@click.argument("name", metavar="NAME|HOST[:PORT]")
@options.specs
@click.option(
    "--fingerprint",
    metavar="SHA256:…",
    default="",
    help="Trust the key with this fingerprint and no other; asks nothing.",
)
@click.option("--replace", is_flag=True, help="Let another key that is trusted now go.")
@click.pass_obj
def trust(
    config: str | None, name: str, files: tuple[str, ...], fingerprint: str, replace: bool
) -> int:
    """Ask a hub for its host keys, show their fingerprints, and trust one.

    NAME: a tunnel that is declared. Where its spec says `host_key: {file: PATH}`, the key is
    written there; else the line for the spec is printed, as for HOST[:PORT]. Exit 4 if another key
    is trusted and --replace is not given: both are shown, and nothing is changed.
    """
    from reconciler.core.trust import judge
    from reconciler.host import host_keys

    if fingerprint and not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", fingerprint):
        raise click.UsageError(
            f"--fingerprint {fingerprint}: write it as `ssh-keygen -lf` prints it, SHA256:…"
        )
    one, host, port = _hub(config, name, files)
    known, trouble = host_keys.pinned(one) if one else (None, "")
    offered = host_keys.scan(host, port, DEADLINE)
    found = judge(offered, known, fingerprint, replace=replace)
    if known is None and one and os.path.exists(one.host_key_file) and not replace:
        # It is there and holds no key: whatever it is, it is not ours to overwrite unasked.
        raise HostError(f"{trouble}; if it may go: reconciler tunnel trust {name} --replace")
    options.say(f"{host} port {port} shows:", err=True)
    _show(offered)
    if found.outcome == "unlike":
        raise HostError(
            f"cannot trust {host} port {port}: none of its keys has the fingerprint {fingerprint}; "
            "another machine answers, or the fingerprint is an old one",
            "HostKeyMismatch",
        )
    if found.outcome == "known":
        options.say(f"trusted already: {found.key.fingerprint} ({_where(one)})", err=True)
        return Exit.OK
    if known and found.outcome == "other":
        options.say(
            f"cannot trust it: {_where(one)} has another key, {known.kind} {known.fingerprint}; "
            "the hub was installed anew, or another machine answers. Compare at the hub; then: "
            f"reconciler tunnel trust {name} --replace",
            err=True,
            error=True,
        )
        return Exit.HELD
    if not fingerprint and not _agreed(found, host, known):
        options.say("nothing was changed", err=True)
        return Exit.ERROR
    _keep(one, host, found.key)
    return Exit.OK


def _hub(config: str | None, name: str, files: Sequence[str]) -> tuple[Tunnel | None, str, Port]:
    """The tunnel, if one is meant; the host and the port to ask."""
    from reconciler.core.tunnel_spec import checked_host
    from reconciler.loop import load_settings
    from reconciler.tunnels import named

    try:
        one = named(name, files, load_settings(config, os.environ))
    except UsageError as error:
        if files:
            raise
        host, port = _address(name)
        try:
            checked_host(host)
        except ValueError as wrong:
            raise click.UsageError(f"{wrong}; and {error}") from wrong
        if "." not in host and ":" not in host:
            options.say(f"{error}; so {host} is taken for a host", err=True)
        return None, host, port
    if not one.host:
        raise HostError(f"cannot ask a hub: the spec of tunnel {one.name} ({one.place}) names none")
    return one, one.host, one.port


def _address(text: str) -> tuple[str, Port]:
    """HOST, HOST:PORT, or [ADDRESS]:PORT. Raises click.UsageError."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:]+)\](?::(\d+))?|([^:]+)(?::(\d+))?|([0-9A-Fa-f:]+)", text)
    if found is None:
        raise click.UsageError(f"cannot read {text!r}: write HOST or HOST:PORT")
    port = int(found[2] or found[4] or PORT)
    if not 1 <= port <= 65535:
        raise click.UsageError(f"cannot use port {port}: it must be within 1-65535")
    return found[1] or found[3] or found[5], port


def _show(keys: Sequence[HostKey]) -> None:
    from reconciler.core.trust import at_hub

    for key in keys:
        options.say(f"  {key.fingerprint}  {key.kind}", err=True)
        options.say(f"      the same at the hub itself: {at_hub(key)}", err=True)


def _where(one: Tunnel | None) -> str:
    if one is None:
        return "nowhere"
    return one.host_key_file or f"`host_key` at {one.place}"


def _agreed(found: Verdict, host: str, known: HostKey | None) -> bool:
    """What a person says to the key; without one there is a fingerprint, or nothing."""
    if not options.can_ask() or options.Manner.quiet:
        _unasked()
    if known:
        options.say(f"in place of {known.fingerprint}  {known.kind}", err=True)
    return click.confirm(
        f"Is {found.key.fingerprint} what the hub itself prints? Trust it as {host}",
        default=False,
        err=True,
    )


def _unasked() -> NoReturn:
    raise click.UsageError(
        "cannot ask without a terminal: compare the fingerprint at the hub, and give it with "
        "--fingerprint SHA256:…"
    )


def _keep(one: Tunnel | None, host: str, key: HostKey) -> None:
    from reconciler.host import host_keys

    if one and one.host_key_file:
        host_keys.write(one.host_key_file, key, host)
        options.say(f"wrote {one.host_key_file}: {key.fingerprint}", err=True)
        return
    if one:
        options.say(f"write this into the tunnel at {one.place}:", err=True)
    click.echo(f'host_key: "{key}"')
