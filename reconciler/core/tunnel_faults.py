"""What the words of an ssh mean: which layer failed, and what helps.

The wordings are OpenSSH's own, which its protocol has no codes for: seen with 9.2, and as its
sources have them up to 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from msgspec import Struct

from reconciler.core.tunnel import Tunnel
from reconciler.core.units import Port


class Fault(Struct, frozen=True):
    """Why a connection is not there."""

    reason: str
    """A CamelCase word for the layer."""
    message: str
    """One sentence, with what was seen and what helps."""
    port: Port | None = None


IN_USE: Final = "Address already in use"
_Say: TypeAlias = Callable[[re.Match[str], Tunnel], tuple[str, str]]


def _local(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    port, why = found["port"], found["why"].strip()
    if why != IN_USE:
        hint = {
            "Cannot assign requested address": "no interface has that address: see `ip address`",
            "Permission denied": "ports below 1024 are for root alone",
        }.get(why, "")
        return (
            "LocalPortUnusable",
            f"ssh cannot listen on {tunnel.bind}:{port}: {why}" + (f" ({hint})" if hint else ""),
        )
    return (
        "LocalPortBusy",
        (
            f"{tunnel.bind}:{port} is in use, and ssh gives up all forwards for it: see "
            f"`ss -ltnp sport = :{port}`"
        ),
    )


def _reverse(_found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    listens = tunnel.reach.listens
    return (
        "ReverseRefused",
        (
            f"the hub does not let us listen on {listens} there: another session holds it, or its "
            f"policy has no `PermitListen {listens}`; on the hub: reconciler doctor --only tunnel"
        ),
    )


def _unresolved(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    return "HubUnresolved", f"the name {tunnel.host} has no address: {found['why'].strip()}"


def _unreachable(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    why = found["why"].strip()
    hint = {
        "Connection refused": "nobody listens there: on the hub, systemctl status ssh",
        "Connection timed out": "no answer: the host is off, or a firewall drops it",
        "Operation timed out": "no answer: the host is off, or a firewall drops it",
        "No route to host": "no way leads there: the link or the host is down",
        "Network is unreachable": "this machine has no route there: see `ip route`",
    }.get(why, "")
    return (
        "HubUnreachable",
        f"no TCP connection to {tunnel.host} port {tunnel.port}: {why}"
        + (f" ({hint})" if hint else ""),
    )


def _silent(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    return (
        "HubNotSsh",
        (
            f"{tunnel.host} port {tunnel.port} takes the connection and says nothing "
            f"({found[0].strip()}): another service listens there, a firewall holds it back, or "
            "its sshd hangs; on the hub: systemctl status ssh"
        ),
    )


def _not_ssh(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    return (
        "HubNotSsh",
        (
            f"{tunnel.host} port {tunnel.port} takes the connection and ends it before it says "
            f"who it is ({found[0].strip()}): another service listens there, a firewall cuts it, "
            "or sshd turns us away (MaxStartups; since OpenSSH 9.8 PerSourcePenalties too, after "
            "logins that failed); on the hub: journalctl -u ssh"
        ),
    )


def _host_key(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    pinned = f"; pinned is {tunnel.host_key.fingerprint}" if tunnel.host_key else ""
    # Of a key of another kind too; not where its file names no key at all. Seen with 9.2.
    theirs = re.search(r"sent by the remote host is\s+(SHA256:[A-Za-z0-9+/]+)", found.string)
    if theirs:
        pinned += f", it has {theirs[1]}" if pinned else f"; it has {theirs[1]}"
    return (
        "HostKeyMismatch",
        (
            f"{tunnel.host} port {tunnel.port} does not have the pinned host key{pinned}: another "
            "machine answers, or the hub was installed anew; compare at the hub (ssh-keygen -lf "
            f"/etc/ssh/ssh_host_ed25519_key.pub), then: reconciler tunnel trust {tunnel.name} "
            "--replace"
        ),
    )


def _denied(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    return (
        "AuthenticationFailed",
        (
            f"the hub does not take the key of {tunnel.user} ({found[0].strip()}): the "
            f"authorized_keys of {tunnel.user} there has no line for it, or wrong owners; on the "
            "hub: reconciler doctor --only tunnel, journalctl -u ssh"
        ),
    )


def _identity(found: re.Match[str], _tunnel: Tunnel) -> tuple[str, str]:
    return "IdentityUnusable", f"ssh cannot use the private key: {found[0].strip()}"


def _lost(found: re.Match[str], tunnel: Tunnel) -> tuple[str, str]:
    return "ConnectionLost", f"the connection to {tunnel.host} was lost: {found[0].strip()}"


def _cipher(found: re.Match[str], _tunnel: Tunnel) -> tuple[str, str]:
    return (
        "NoCommonCipher",
        f"the two ends have no {found['what']} in common; the hub offers {found['theirs'].strip()}",
    )


def _usage(found: re.Match[str], _tunnel: Tunnel) -> tuple[str, str]:
    return "SshUsage", f"this ssh does not take what it is told: {found[0].strip()}"


_RULES: Final[Sequence[tuple[str, _Say]]] = (
    (r"bind \[[^\]]*\]:(?P<port>\d+): (?P<why>[^\n]+)", _local),
    (r"(?P<why>cannot listen to port): (?P<port>\d+)", _local),
    (r"remote port forwarding failed for listen port (?P<port>\d+)", _reverse),
    (r"Could not resolve hostname [^:]*: (?P<why>[^\n]+)", _unresolved),
    (
        r"ssh: connect to host .+ port \d+: (?P<why>[^\n]+)",
        _unreachable,
    ),
    (
        (
            r"No matching host key fingerprint[^\n]*|Host key verification failed|"
            r"REMOTE HOST IDENTIFICATION HAS CHANGED|No \S+ host key is known for[^\n]*"
        ),
        _host_key,
    ),
    (
        (
            r"Load key [^\n]*|no such identity: [^\n]*|"
            r"Identity file [^\n]* not accessible[^\n]*|Permissions \d+ for [^\n]* are too open"
        ),
        _identity,
    ),
    (r"Permission denied \([^)]*\)|Too many authentication failures", _denied),
    (
        r"no matching (?P<what>[A-Za-z ]+) found\. Their offer: (?P<theirs>[^\n]+)",
        _cipher,
    ),
    (
        (
            r"[Bb]ad configuration option[^\n]*|unknown option[^\n]*|"
            r"Bad [^\n]* specification[^\n]*|command-line line \d+: [^\n]*|Bad SSH2 [^\n]*"
        ),
        _usage,
    ),
    (r"Connection timed out during banner exchange", _silent),
    (
        (
            r"kex_exchange_identification: [^\n]*|banner exchange: [^\n]*|"
            r"ssh_exchange_identification: [^\n]*|Connection closed by \S+ port \d+"
        ),
        _not_ssh,
    ),
    (
        (
            r"Timeout, server \S+ not responding|client_loop: [^\n]*|"
            r"Connection to \S+ closed by remote host|Connection reset by [^\n]*|"
            r"Read from remote host [^\n]*|Write failed: [^\n]*|"
            r"Received disconnect from [^\n]*|Connection to \S+ (?:port \d+ )?timed out|Broken pipe"
        ),
        _lost,
    ),
)


def fault(words: str, tunnel: Tunnel) -> Fault:
    """What the last words of an ssh that ended mean. Of several, the first rule that fits."""
    for pattern, say in _RULES:
        if found := re.search(pattern, words):
            reason, message = say(found, tunnel)
            port = found.groupdict().get("port")
            return Fault(reason, message, int(port) if port else None)
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"channel \d+: open failed", line)]
    said = f"its ssh ended: {lines[-1]}" if lines else "its ssh ended and said nothing"
    return Fault("SshEnded", said)
