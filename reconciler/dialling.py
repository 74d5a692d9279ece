"""The tunnels of one look, and the hands that dial them: ssh processes, ports, what answers."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from reconciler.core.actual import Identity
from reconciler.core.errors import HostError
from reconciler.core.settings import Secret, Settings
from reconciler.core.tunnel import DATA, MARK, HostKey, Tunnel, known_hosts, mark_of
from reconciler.core.tunnel_faults import fault
from reconciler.core.tunnel_plan import STARTING
from reconciler.core.tunnel_seen import Check, Ssh, TunnelSeen
from reconciler.core.units import Endpoint, Port, Seconds, format_duration
from reconciler.host import host_keys, proc, processes, qemu_nbd, ssh, tunnelling
from reconciler.host.effects import Effect, effect

ASK: Final[Seconds] = 3.0
"""Deadline of each question through a tunnel. Over a slow link an answer takes 0.3 s."""
SWEEP: Final[Seconds] = 1.0
"""How long all forwards are tried at once. A refusal takes one round trip; where the hub keeps the
socket of a server that is down, there is nothing to wait for."""
ALIVE: Final = "/healthz"
RUNNING: Final = "/api/v1/backups?status=running"
"""Paths of the hub's API."""
APPLIANCE_ALIVE: Final = "/api/v1/health"
"""Of the appliance's. Source: Sendense, October 2025."""
PROBE: Final[Seconds] = 0.02
"""A probe of another command of ours is over by then; a client stays."""
GRACE: Final[Seconds] = 5.0
"""From SIGTERM to SIGKILL. ssh ends within some milliseconds."""
EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 compared, not bound
WORDS: Final = 8192
"""Bytes at the end of a log in which the last words of an ssh are."""


def lines_of(hub: str) -> list[Ssh]:
    """Every ssh of ours, in one pass over all processes; not yet what it listens on."""
    found = []
    for process in proc.processes(MARK.encode()):
        mark = mark_of(process.argv)
        if mark and mark.hub == hub:
            found.append(
                Ssh(
                    pid=process.identity.pid,
                    started=process.identity.started,
                    argv=process.argv,
                    mark=mark,
                    age=proc.age(process.identity),
                )
            )
    return found


class Dialler:
    """Looks at tunnels and dials them, for one config. Needs no lock to look."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings, self.environment = settings, environment

    # -- looking

    def look(
        self, tunnels: Mapping[str, Tunnel], lines: Sequence[Ssh], *, ask: bool = True
    ) -> dict[str, TunnelSeen]:
        """`tunnel/NAME` → what is seen of it. Raises HostError."""
        sockets = self._settled({port for one in tunnels.values() for port in _local(one)})
        return {
            name: self._seen(
                tunnel, [one for one in lines if one.mark.subject == name], sockets, ask
            )
            for name, tunnel in tunnels.items()
        }

    def _settled(self, ports: Collection[Port]) -> list[proc.Socket]:
        """The sockets on some ports, without connections that come and go."""
        found = [one for one in proc.tcp_sockets() if one.port in ports]
        if all(one.listening for one in found):
            return found
        time.sleep(PROBE)
        still = {one.peer for one in proc.tcp_sockets() if not one.listening}
        return [one for one in found if one.listening or one.peer in still]

    def _seen(
        self, tunnel: Tunnel, lines: Sequence[Ssh], sockets: Sequence[proc.Socket], ask: bool
    ) -> TunnelSeen:
        listeners = [
            one
            for one in sockets
            if one.listening and one.port in set(_local(tunnel)) and _conflicts(tunnel, one.address)
        ]
        clients = Counter(
            one.port for one in sockets if not one.listening and one.address == tunnel.bind
        )
        found, own = [], set[int]()
        for line in lines:
            inodes = proc.socket_inodes(line.pid)
            mine = frozenset(one.port for one in listeners if one.inode in inodes)
            own |= {one.inode for one in listeners if one.inode in inodes}
            count = sum(clients[port] for port in mine)
            found.append(msgspec.structs.replace(line, listening=mine, clients=count))
        busy = self._busy([one for one in listeners if one.inode not in own])
        key, key_error = host_keys.pinned(tunnel)
        identity, identity_error = self._identity(tunnel)
        ssh_error = ""
        try:
            ssh.find()
        except HostError as error:
            ssh_error = str(error)
        up = {
            line.mark.part
            for line in found
            if line.listening.issuperset(tunnel.ports(line.mark.part))
        }
        return TunnelSeen(
            lines=tuple(found),
            busy=busy,
            key=key,
            key_error=key_error,
            identity=identity,
            identity_error=identity_error,
            ssh_error=ssh_error,
            known=self._known(tunnel, key),
            words=dict(self._words(tunnel, found)),
            checks=tuple(self._checks(tunnel, clients)) if ask and up >= set(tunnel.parts) else (),
        )

    def _busy(self, strangers: Sequence[proc.Socket]) -> dict[Port, str]:
        holders = proc.holders(one.inode for one in strangers)
        found = {}
        for one in strangers:
            pid = holders.get(one.inode)
            found[one.port] = (
                f"{proc.name_of(pid)} (pid {pid})" if pid else "a process that is not ours to see"
            )
        return found

    def _identity(self, tunnel: Tunnel) -> tuple[str, str]:
        """Where the private key is, and why ssh cannot use it."""
        ref = tunnel.identity
        if ref is None:
            return "", ""
        path = ref.name
        if ref.kind == "credential":
            directory = self.environment.get("CREDENTIALS_DIRECTORY")
            if not directory:
                said = "not started by systemd with LoadCredential="
                return "", f"cannot read the credential {ref.name}: {said}"
            path = os.path.join(directory, ref.name)
        return path, ssh.key_trouble(path)

    def _known(self, tunnel: Tunnel, key: HostKey | None) -> str:
        if key is None:
            return ""
        return os.path.join(self.settings.state, "tunnels", known_hosts(tunnel, key)[0])

    def log_of(self, tunnel: Tunnel, part: str) -> Path:
        """Where the ssh of a connection says what is wrong."""
        return Path(self.settings.state) / "logs" / log_name(tunnel.name, part)

    def _words(self, tunnel: Tunnel, lines: Sequence[Ssh]) -> Iterator[tuple[str, Check]]:
        here = {line.mark.part for line in lines}
        for part in tunnel.parts:
            if part not in here:
                log = self.log_of(tunnel, part)
                words = ssh.words(log, max(0, ssh.size(log) - WORDS))
                if words:
                    found = fault(words, tunnel)
                    yield part, Check(found.reason, found.message)

    # -- what answers through it

    def _checks(self, tunnel: Tunnel, clients: Mapping[Port, int]) -> Iterator[Check]:
        """The questions whose answers mean something; a TCP connect through ssh always succeeds."""
        api = Endpoint(tunnel.bind, tunnel.reach.api)
        answer = tunnelling.http_get(api, ALIVE, ASK)
        if answer.silent:
            alive = format_duration(tunnel.alive_interval * (tunnel.alive_count + 1))
            yield Check(
                "TunnelSilent",
                f"nothing comes back through the tunnel: {answer.error} from the hub's API through "
                f"{api}; the link, the hub, or its API. A connection that stays so is given up "
                f"after {alive} and dialled again",
            )
        elif answer.error or answer.status >= 500:
            yield Check(
                "HubApiSilent",
                f"the hub's API does not answer through {api}: "
                f"{answer.error or f'HTTP {answer.status}'}; on the hub: reconciler status, and "
                "systemctl status reconciler",
            )
        else:
            yield Check("", f"the hub's API answers through {api}")
            yield from self._exports(tunnel, api, clients)
        answer = tunnelling.http_get(tunnel.appliance, APPLIANCE_ALIVE, ASK)
        if answer.error or answer.status >= 500:
            yield Check(
                "ApplianceSilent",
                f"the appliance's own API at {tunnel.appliance} does not answer, so the hub finds "
                f"nobody behind port {tunnel.reach.reverse}: "
                f"{answer.error or f'HTTP {answer.status}'}",
            )
        else:
            yield Check("", f"the appliance's API answers at {tunnel.appliance}")

    def _exports(
        self, tunnel: Tunnel, api: Endpoint, clients: Mapping[Port, int]
    ) -> Iterator[Check]:
        """NBD greetings of the exports that the hub says are up. A port that a client uses is
        left alone: a greeting takes one of the server's places."""
        try:
            token = self._token(tunnel)
        except HostError as error:
            yield Check("TokenUnreadable", str(error))
            return
        answer = tunnelling.http_get(api, RUNNING, ASK, token)
        if answer.status in (401, 403) and token is not None:
            yield Check(
                "TokenRefused",
                f"the hub's API does not take the token of this tunnel (HTTP {answer.status}), so "
                f"its exports are not checked: see {tunnel.token}, and `api: tokens:` of the hub",
            )
            return
        if answer.error or answer.status != 200:
            why = answer.error or f"HTTP {answer.status}"
            if answer.status in (401, 403):
                why += ": the hub's API asks for a token: write `token: {file: …}` into the spec"
            yield Check("", f"exports are not checked: {why}", skipped=True)
            return
        up = [port for port in exports_in(answer.body) if port in tunnel.reach.ports]
        asked = [Endpoint(tunnel.bind, port) for port in up if not clients.get(port)]
        silent = {
            one.port: why
            for one, why in zip(asked, tunnelling.greets(asked, ASK), strict=True)
            if why
        }
        for port, why in silent.items():
            yield Check(
                "ExportSilent",
                f"the hub says that an export is up on port {port}, and no NBD greeting comes "
                f"through {tunnel.bind}:{port}: {why}",
            )
        if not silent:
            many = f"all {len(up)} exports greet, or are in use" if up else "no export is up"
            yield Check("", many)

    def _token(self, tunnel: Tunnel) -> Secret | None:
        if tunnel.token is None:
            return None
        from reconciler.host.files import secret

        return secret(tunnel.token, self.environment)

    # -- dialling

    def dial(self, tunnel: Tunnel, part: str, argv: Sequence[str]) -> Ssh:
        """Start an ssh and wait until the hub has let it in. Raises HostError with the layer."""
        binary = ssh.find()
        self._pin(tunnel)
        log = self.log_of(tunnel, part)
        qemu_nbd.cap(log)
        before = ssh.size(log)
        with effect(Effect.DIAL):
            pid = ssh.spawn(binary, argv, log)
        deadline = time.monotonic() + tunnel.connect_timeout + STARTING
        wanted = set(tunnel.ports(part))
        identity = proc.identify(pid)
        while identity and time.monotonic() < deadline:
            inodes = proc.socket_inodes(pid)
            mine = {one.port for one in proc.tcp_sockets(established=False) if one.inode in inodes}
            if wanted <= mine:
                # The hub answers in order: when it has answered this, it has said yes or no to the
                # reverse port too, and with a no ssh ends.
                if part != DATA:
                    tunnelling.http_get(Endpoint(tunnel.bind, tunnel.reach.api), "/", ASK)
                time.sleep(PROBE)
                if proc.identify(pid) == identity:
                    mark = mark_of(argv)
                    assert mark is not None
                    return Ssh(
                        pid=pid,
                        started=identity.started,
                        argv=tuple(argv),
                        mark=mark,
                        listening=frozenset(mine),
                    )
            time.sleep(0.01)
            identity = proc.identify(pid)
        if identity:
            self._end(identity)
            raise HostError(
                f"cannot dial {tunnel.target}: it did not let us in within "
                f"{tunnel.connect_timeout + STARTING:g} s (log: {log})",
                "HubSilent",
            )
        processes.reap(pid)
        found = fault(ssh.words(log, before if before <= ssh.size(log) else 0), tunnel)
        raise HostError(f"cannot dial {tunnel.target}: {found.message} (log: {log})", found.reason)

    def _pin(self, tunnel: Tunnel) -> None:
        """Write the file by which ssh knows the hub, unless it is there. Raises HostError."""
        key, error = host_keys.pinned(tunnel)
        if key is None:
            raise HostError(f"cannot dial {tunnel.target}: {error}", "HostKeyUnknown")
        name, text = known_hosts(tunnel, key)
        path = Path(self.settings.state) / "tunnels" / name
        try:
            if path.exists() and path.read_text() == text:
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = path.with_name(f".{name}.{os.getpid()}")
            fresh.write_text(text)
            fresh.replace(path)
        except OSError as failure:
            raise HostError(
                f"cannot write {path}, by which ssh knows the hub: {failure.strerror}", "Storage"
            ) from failure

    def hang_up(self, line: Ssh) -> None:
        """End an ssh and wait until it is gone. Raises HostError."""
        with effect(Effect.HANG_UP):
            self._end(Identity(line.pid, line.started))

    def _end(self, identity: Identity) -> None:
        try:
            with processes.Handle(identity, proc.identify) as handle:
                handle.end(GRACE)
        except processes.Gone:
            pass
        processes.reap(identity.pid)

    def refused(self, tunnel: Tunnel, part: str) -> list[Port]:
        """The forwards of a connection that the hub's sshd does not permit."""
        log, reach = self.log_of(tunnel, part), tunnel.reach
        ports = tunnel.ports(part)
        ends = [Endpoint(tunnel.bind, port) for port in ports if port in reach.ports]
        found = tunnelling.refused_ports(ends, log, SWEEP)
        if reach.api in ports and tunnelling.refused_api(Endpoint(tunnel.bind, reach.api), log):
            found.append(reach.api)
        return sorted(found)


def _local(tunnel: Tunnel) -> tuple[Port, ...]:
    return tunnel.ports("whole")


def _conflicts(tunnel: Tunnel, address: str) -> bool:
    """Whether a listener at `address` keeps ssh from listening where it should."""
    return address in (*EVERYWHERE, tunnel.bind, f"::ffff:{tunnel.bind}")


def log_name(tunnel: str, part: str) -> str:
    """The name of a connection's log in the directory of logs."""
    return f"tunnel-{tunnel}-{part}.log"


def exports_in(body: bytes) -> list[Port]:
    """The ports of the exports that a list of backups says are up. Source: WIRE, disk_results."""
    try:
        found = msgspec.json.decode(body)
        return sorted(
            {
                disk["nbd_port"]
                for backup in found["backups"]
                for disk in backup["disk_results"]
                if disk["status"] == "qemu_started" and disk["nbd_port"]
            }
        )
    except (msgspec.DecodeError, KeyError, TypeError):
        return []
