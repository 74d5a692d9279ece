"""render sshd, render tunnel: both ends of a tunnel as files that work without this program."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from reconciler.cli import options, rendering
from reconciler.cli.rendering import CREDENTIALS
from reconciler.core.errors import Exit, HostError

if TYPE_CHECKING:
    from reconciler.core.sshd import Policy
    from reconciler.core.tunnel import HostKey, Tunnel

DIRECTORY: Final = "/etc/reconciler/tunnels"
"""Where ssh finds what it is told, at the SNA."""
SSH: Final = "/usr/bin/ssh"
MOST: Final = 1 << 16
"""Bytes of a file with a public key that are read."""


@click.command()
@click.option(
    "--user", help="The account they come to. [default: `tunnel: {user: …}` of the config]"
)
@click.option(
    "--sna", "names", multiple=True, metavar="NAME", help="Keys of this SNA alone; repeatable."
)
@click.option(
    "--key",
    "keys",
    multiple=True,
    metavar="[SNA=]FILE.pub",
    help="The public key of an SNA; repeatable. With one SNA, SNA= may be left out.",
)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Have sshd listen there too, beside 22."
)
@click.option("--output", type=click.Path(file_okay=False), help="Write the files there instead.")
@click.pass_obj
def sshd(
    config: str | None,
    user: str | None,
    names: tuple[str, ...],
    keys: tuple[str, ...],
    port: int | None,
    output: str | None,
) -> int:
    """Print what the hub's sshd needs for the tunnels of its SNAs.

    The `Match User` policy, the authorized_keys, and the commands that install both. What may be
    reached is what the config says: `ports: {range: …}`, `api: {listen: …}`, and the port in each
    SNA's `url`.
    """
    from msgspec.structs import replace

    from reconciler.core.errors import nearest
    from reconciler.core.sshd import near, policy
    from reconciler.core.tunnel_spec import checked_user
    from reconciler.loop import load_settings

    settings = load_settings(config, os.environ)
    for name in names:
        if name not in settings.snas:
            raise click.UsageError(f"the config has no SNA {name!r}{nearest(name, settings.snas)}")
    found = policy(settings)
    if user is not None:
        try:
            found = replace(found, user=checked_user(user))
        except ValueError as error:
            raise click.UsageError(f"--user: {error}") from error
    for name, why in found.skipped.items():
        options.say(f"note: SNA {name} is left out: {why}", err=True)
    if not found.reaches:
        raise HostError(
            "cannot render a policy: no SNA of the config is reached by a port of this machine; "
            'write `snas: {site-a: {url: "http://127.0.0.1:9081"}}`'
        )
    for number, several in found.doubled.items():
        raise HostError(
            f"cannot render a policy: {' and '.join(several)} both have port {number} in their "
            "`url`, and only one tunnel can listen there; give each a port of its own"
        )
    if near(settings.listen.host) != near(settings.bind):
        options.say(
            f"warning: exports are on {near(settings.bind)} and the API on "
            f"{near(settings.listen.host)}, and a tunnel names one host: have `ports: {{bind: …}}` "
            "and `api: {listen: …}` agree",
            err=True,
        )
    wanted = [name for name in found.reaches if not names or name in names]
    files = _hub_files(
        found, wanted, _keys(wanted, keys), settings.hub, None if port == 22 else port
    )
    rendering.given(files, output)
    return Exit.OK


def _keys(names: Sequence[str], written: Sequence[str]) -> dict[str, HostKey]:
    """SNA → its public key. Raises click.UsageError, HostError."""
    found: dict[str, HostKey] = {}
    for text in written:
        name, sign, path = text.partition("=")
        if not sign or name not in names:
            if sign and not Path(text).exists():
                known = ", ".join(names)
                raise click.UsageError(f"--key {text}: there is no SNA {name!r} here: {known}")
            if len(names) != 1:
                known = " or ".join(f"{one}={text}" for one in names)
                raise click.UsageError(f"--key {text}: say whose it is: {known}")
            name, path = names[0], text
        if name in found:
            raise click.UsageError(f"--key is given twice for {name}")
        key = _public(path)
        for other, known_key in found.items():
            if known_key == key:
                raise click.UsageError(
                    f"{other} and {name} have the same key, and sshd takes the first line of it: "
                    f"{name} would have {other}'s reverse port; make a key for each"
                )
        found[name] = key
    return found


def _public(path: str) -> HostKey:
    from reconciler.core.tunnel import HostKey

    try:
        text = Path(path).read_bytes()[:MOST].decode("utf-8", "replace")
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    if "PRIVATE KEY" in text:
        raise HostError(
            f"cannot use {path}: it is a private key, which stays where it was made; the hub "
            f"needs {path}.pub"
        )
    try:
        return HostKey.parse(text)
    except ValueError as error:
        raise HostError(f"cannot use {path} as a public key: it has to begin like "
                        "`ssh-ed25519 AAAAC3…`") from error  # fmt: skip


def _hub_files(
    policy: Policy,
    names: Sequence[str],
    keys: Mapping[str, HostKey],
    hub: str,
    port: int | None,
) -> dict[str, str]:
    from reconciler.core.sshd import DROP_IN, NO_SHELL, authorized_line, directives

    snas = [
        {
            "name": name,
            "listens": str(policy.reaches[name].listens),
            "line": authorized_line(policy.reaches[name], keys[name], name) if name in keys else "",
        }
        for name in names
    ]
    keys_file = policy.keys.replace("%u", policy.user)
    values: dict[str, Any] = {
        "hub": hub,
        "user": policy.user,
        "port": port,
        "directives": directives(policy),
        "snas": snas,
        "whole": keys.keys() == policy.reaches.keys(),
        "no_shell": NO_SHELL,
        "keys_file": keys_file,
        "keys_directory": posixpath.dirname(keys_file),
        "drop_in": DROP_IN,
        "drop_in_name": posixpath.basename(DROP_IN),
        "drop_in_directory": posixpath.dirname(DROP_IN),
    }
    return {
        posixpath.basename(DROP_IN): rendering.rendered("tunnel.sshd_config", values),
        "authorized_keys": rendering.rendered("tunnel.authorized_keys", values),
        "install.txt": rendering.rendered("tunnel.sshd_install.txt", values),
    }


@click.command()
@click.argument("name", metavar="NAME")
@options.specs
@click.option("--user", default="tunnel", show_default=True, help="Who ssh runs as here; not root.")
@click.option("--output", type=click.Path(file_okay=False), help="Write the files there instead.")
@click.pass_obj
def tunnel(
    config: str | None, name: str, files: tuple[str, ...], user: str, output: str | None
) -> int:
    """Print the ssh_config and the systemd unit of a tunnel, at the SNA's side.

    They work without this program; then its spec says `state: down`, or is not there.
    """
    from reconciler.core.tunnel_spec import checked_user
    from reconciler.host.host_keys import pinned
    from reconciler.loop import load_settings
    from reconciler.tunnels import named

    try:
        checked_user(user)
    except ValueError as error:
        raise click.UsageError(f"--user: {error}") from error
    one = named(name, files, load_settings(config, os.environ))
    if not one.host or one.identity is None:
        raise HostError(
            f"cannot render tunnel {one.name}: its spec ({one.place}) has no "
            f"{'hub' if not one.host else 'identity'}"
        )
    key, why_not = pinned(one)
    if key is None:
        raise HostError(
            f"cannot render tunnel {one.name}: {why_not or 'its spec names no host_key'}; "
            f"see: reconciler tunnel trust {one.name}",
            "HostKeyUnknown",
        )
    if one.identity.kind == "file":
        rendering.warn_unseen([one.identity.name])
    rendering.given(_appliance_files(one, key, user), output)
    return Exit.OK


def _appliance_files(one: Tunnel, key: HostKey, user: str) -> dict[str, str]:
    from reconciler.core import tunnel as core
    from reconciler.core.sshd import NO_SHELL
    from reconciler.core.units import Endpoint

    assert one.identity is not None
    credential = one.identity.name if one.identity.kind == "credential" else ""
    # IdentityFile takes a variable, by which systemd says where the file is. Source: ssh_config(5).
    identity = f"${{CREDENTIALS_DIRECTORY}}/{credential}" if credential else one.identity.name
    known = f"{one.name}.known_hosts"
    texts: dict[str, str] = {}
    units = []
    for part in one.parts:
        more = "" if part == core.WHOLE else f"-{part}"
        config, unit = f"{one.name}{more}.ssh_config", f"reconciler-tunnel-{one.name}{more}.service"
        told = core.options(one, rendering.tokens(identity, variable=bool(credential)),
                            f"{DIRECTORY}/{known}")  # fmt: skip
        ports = one.ports(part)
        forwards = list(core.forwards(one, part))
        back = f"{one.reach.listens} there comes back to {one.appliance}"
        reached = f"{len(ports)} port{'s' * (len(ports) != 1)} of {one.target} on {one.bind} here"
        values = {
            "tunnel": one,
            "part": more.removeprefix("-"),
            "unit": unit,
            "said": f"{reached}; {back}" if part != core.DATA else reached,
            "options": list(told.items()),
            "forwards": forwards,
            "command": [SSH, "-F", f"{DIRECTORY}/{config}", "-N", "-T", one.name],
            "user": user,
            "credentials": [credential] if credential else [],
            "credential_directory": CREDENTIALS,
            "privileged": min(ports) < 1024,
        }
        texts[config] = rendering.rendered("tunnel.ssh_config", values)
        texts[unit] = rendering.rendered("tunnel.service", values)
        units.append(unit)
    texts[known] = core.known_hosts(one, key)[1]
    texts["install.txt"] = rendering.rendered(
        "tunnel.install.txt",
        {
            "tunnel": one,
            "user": user,
            "no_shell": NO_SHELL,
            "directory": DIRECTORY,
            "configs": [name for name in texts if not name.endswith(".service")],
            "credential": credential,
            "credential_directory": CREDENTIALS,
            "identity": identity,
            "fingerprint": key.fingerprint,
            "units": units,
            "api": str(Endpoint(one.bind, one.reach.api)),
        },
    )
    return texts
