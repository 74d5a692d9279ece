"""Look at both ends of tunnels: the sshd of a hub, and what an appliance dials with."""

from __future__ import annotations

import os
import posixpath
import pwd
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct, field

from reconciler import reaching
from reconciler.core import tunnel_doctor as core
from reconciler.core.appliances import Health, Holder, near_end
from reconciler.core.doctor import Check, failed, ok, unknown
from reconciler.core.errors import HostError
from reconciler.core.settings import Settings
from reconciler.core.sshd import Policy, effective, policy
from reconciler.core.tunnel import HostKey, Reach, Tunnel
from reconciler.core.tunnel_doctor import Account, Sshd
from reconciler.core.units import Endpoint, Seconds
from reconciler.dialling import Dialler, lines_of
from reconciler.host import accounts, files, host_keys, machine, proc, store
from reconciler.tunnels import declared

ASK: Final[Seconds] = 3.0
"""For each connection to a hub's sshd."""
SOCKETS: Final = ("ssh.socket", "sshd.socket")
"""The units by which systemd listens for sshd, as distributions call them."""
NOWHERE: Final = "192.0.2.1"
"""An address from outside, where none is known: what sshd says for it. Source: RFC 5737."""
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin"


class Known(Struct, frozen=True):
    """The tunnels that this machine is to dial."""

    tunnels: Mapping[str, Tunnel] = field(default_factory=dict)
    """Name → the tunnel: what specs declare now, else what was applied."""
    checks: Sequence[Check] = ()
    """What cannot be read of them."""


def known(settings: Settings, paths: Sequence[str]) -> Known:
    """What was applied, and what specs below `paths` declare. Raises HostError."""
    ledger = store.read(Path(settings.state))
    applied = [Tunnel.from_json(row.vm) for row in ledger.tunnels.values()] if ledger else []
    tunnels = {one.name: one for one in applied}
    if not _speak(paths):
        return Known(tunnels)
    said = declared(paths, settings)
    wrong = [one for one in said.diagnostics if one.severity == "error"]
    if not wrong:
        return Known({**tunnels, **said.tunnels})
    more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    fix = "reconciler validate" + "".join(f" -f {path}" for path in paths)
    told = failed("tunnel.declared", "tunnels declared", f"{wrong[0]}{more}", fix)
    return Known({**tunnels, **said.tunnels}, (told,))


def checks(
    settings: Settings,
    environment: Mapping[str, str],
    found: Known,
    health: Callable[[str], Health],
) -> Iterator[Check]:
    """What a hub's and an appliance's end need. `health`: asks an SNA of the config."""
    wanted = policy(settings)
    yield from found.checks
    if wanted.reaches:
        yield from _hub_end(wanted, settings, health)
    for name in sorted(found.tunnels):
        yield from _appliance_end(found.tunnels[name], settings, environment)
    if not (wanted.reaches or found.tunnels or found.checks):
        said = "none here: no SNA is behind a port of this machine, and no tunnel is declared"
        yield ok("tunnel", "tunnel", said)


def _speak(paths: Sequence[str]) -> bool:
    """Whether specs say anything of tunnels; else they, and what lies around them, are not read."""
    try:
        texts = files.texts(paths or (files.SPECS,))
    except files.NothingNamed:
        if paths:
            raise
        return False
    return any("tunnels" in one.text for one in texts)


# -- the hub


def _hub_end(
    wanted: Policy, settings: Settings, health: Callable[[str], Health]
) -> Iterator[Check]:
    held: dict[str, Holder] = {}
    told: dict[str, list[Check]] = {}
    for name, reach in wanted.reaches.items():
        near = near_end(settings.snas[name].url)
        found = reaching.holder(*near) if near else None
        if found:
            held[name] = found
        try:
            answer = health(name) if found else Health()
        except HostError as error:  # its token; the group of secrets says what helps
            answer = Health(kind="other", said=str(error))
        told[name] = list(core.reverse(name, reach, found, answer, wanted.user, _exposed(reach)))
    # An appliance of this very machine, which answers by itself, needs no sshd.
    here = {
        name
        for name, one in held.items()
        if one.pid and not one.sshd and all(check.status == "ok" for check in told[name])
    }
    if here != wanted.reaches.keys():
        yield from _sshd(wanted, next((one for one in held.values() if one.sshd), None))
    for some in told.values():
        yield from some


def _exposed(reach: Reach) -> str:
    """An address at which other machines reach a reverse port too; empty: there is none."""
    for one in proc.tcp_sockets(established=False):
        if one.listening and one.port == reach.reverse:
            end = Endpoint(one.address, one.port)
            if not end.loopback and one.address != reach.host:
                return str(end)
    return ""


def _sshd(wanted: Policy, session: Holder | None) -> Iterator[Check]:
    """The server, the account, its keys and the policy."""
    found = _server(session)
    yield core.server(found)
    if not found.binary:
        return
    who = accounts.account(wanted.user)
    if os.geteuid() != 0:
        yield core.account(wanted.user, who, pam=True)
        said = "what sshd permits, and which keys it takes, is root's to see"
        yield unknown("tunnel.policy", "sshd's policy", said, core.AS_ROOT)
        return
    peer = session.peer.rpartition(":")[0].strip("[]") if session and session.peer else NOWHERE
    line = [found.binary, "-T", *(["-f", found.config] if found.config else [])]
    line += ["-C", f"user={wanted.user},host={peer},addr={peer}"]
    code, said = machine.program(line, 5.0)
    if code:
        yield core.account(wanted.user, who, pam=True)
        yield failed("tunnel.policy", "sshd's policy", f"{' '.join(line)}: {said or code}",
                     f"correct what it says; {found.binary} -t")  # fmt: skip
        return
    rules = effective(said)
    yield core.account(wanted.user, who, pam=rules.get("usepam", ["no"]) == ["yes"])
    yield from core.rules(wanted, rules, who.groups if who else (), " ".join(line))
    if who:
        strict = rules.get("strictmodes", ["yes"]) == ["yes"]
        some = [
            accounts.key_file(path, who, strict=strict)
            for path in key_files(rules.get("authorizedkeysfile", ()), who)
        ]
        if not some and rules.get("authorizedkeyscommand", ["none"]) != ["none"]:
            command = " ".join(rules["authorizedkeyscommand"])
            yield unknown("tunnel.keys", "authorized keys", f"{command} says which keys there are")
            return
        yield from core.keys(wanted, some)


def key_files(written: Sequence[str], who: Account) -> list[str]:
    """The files of keys of an account. Source: sshd_config(5), AuthorizedKeysFile, TOKENS."""
    words = {"%%": "%", "%u": who.name, "%h": who.home, "%U": str(who.uid)}
    found = []
    for one in written:
        if one == "none":
            continue
        path = re.sub(r"%[%uhU]", lambda match: words[match[0]], one)
        found.append(path if path.startswith("/") else posixpath.join(who.home, path))
    return found


def _server(session: Holder | None) -> Sshd:
    """The sshd that a session comes from; else one of this machine, its own first."""
    binary = shutil.which("sshd", path=_PATH) or ""
    running = listeners()
    ancestors = set(_ancestors(session.pid)) if session and session.pid else set()
    # One that was started with a configuration of its own is somebody's second.
    running.sort(key=lambda one: (one.pid not in ancestors, bool(one.config), one.pid))
    if running:
        return running[0] if running[0].binary else Sshd(binary=binary)
    for unit in SOCKETS if binary else ():
        code, said = machine.program(["systemctl", "is-active", unit], 3.0)
        if code == 0 and said == "active":
            return Sshd(binary=binary, waits=unit)
    return Sshd(binary=binary)


def listeners() -> list[Sshd]:
    """Every sshd that listens, by what its processes call themselves.

    Source: OpenSSH, sshd.c, setproctitle().
    """
    found = []
    listening = {one.inode: one for one in proc.tcp_sockets(established=False) if one.listening}
    for process in proc.processes(b"sshd"):
        pid = process.identity.pid
        title = " ".join(process.argv).strip()
        told = re.match(r"sshd: (?P<line>.+) \[listener\]", title)
        line = (told["line"] if told else title).split()
        if proc.name_of(pid) != "sshd" or not line or posixpath.basename(line[0]) != "sshd":
            continue
        if _network(pid) not in ("", _network(os.getpid())):
            continue  # a container's
        ports = {listening[i].port for i in proc.socket_inodes(pid) if i in listening}
        config = ""
        for word, following in zip(line, [*line[1:], ""], strict=True):
            if word.startswith("-f"):
                config = word[2:] or following
        if config and not config.startswith("/"):
            try:
                config = posixpath.join(os.readlink(f"/proc/{pid}/cwd"), config)
            except OSError:
                continue  # it ended, or is another user's
        found.append(Sshd(binary=line[0], pid=pid, config=config, ports=tuple(sorted(ports))))
    return found


def _network(pid: int) -> str:
    """The network namespace of a process; empty: it is not ours to see."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])


# -- the appliance


def _appliance_end(
    one: Tunnel, settings: Settings, environment: Mapping[str, str]
) -> Iterator[Check]:
    if not one.up:
        said = "declared to be down: not looked at"
        yield ok(f"tunnel.{one.name}", f"tunnel {one.name}", said)
        return
    eyes = Dialler(settings, environment)
    seen = eyes.look({one.subject: one}, lines_of(settings.hub), ask=False)[one.subject]
    _, version = machine.program(["ssh", "-V"], 5.0)
    shown: Sequence[HostKey] = ()
    fault = reason = ""
    try:
        shown = host_keys.scan(one.host, one.port, ASK)
    except HostError as error:
        fault, reason = str(error), error.reason
    yield from core.appliance_end(
        one, seen, version, _mode(seen.identity) if seen.identity else "", shown, fault, reason
    )


def _mode(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError:
        return ""
    try:
        owner = pwd.getpwuid(info.st_uid).pw_name
    except KeyError:
        owner = f"uid {info.st_uid}"
    return f"{owner}'s, mode {info.st_mode & 0o7777:04o}"
