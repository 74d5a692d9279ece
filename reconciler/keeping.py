"""What a daemon keeps of its servers between looks: who they are, and copies of their sockets."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Final

from msgspec.structs import replace

from reconciler.core.actual import Actual, Handshake, Identity, Server
from reconciler.core.appliances import Health
from reconciler.core.call import Report
from reconciler.core.desired import Desired, Export
from reconciler.core.errors import HostError
from reconciler.core.ledger import Lease, Ledger
from reconciler.core.mark import Served, parse
from reconciler.core.settings import Settings
from reconciler.core.tunnel_seen import Ssh
from reconciler.core.units import Port
from reconciler.host import patience, proc, processes, sockets
from reconciler.host.images import look as look_at
from reconciler.host.store import Store
from reconciler.hub import Hub
from reconciler.look import PROBE
from reconciler.repositories import roots_of

FEW: Final = 4
"""VMs of a look, up to which clients are counted server by server. One question to the kernel for
all connections takes 3 ms and more, measured; a server's descriptors take 0.05 ms."""


TURNS: Final = 4
"""Resyncs in which every server is asked for a handshake once. Its process, its socket and its
image are looked at in each; a handshake is what costs most, 0.3 ms, and a server that listens
is rarely silent."""


class Sockets:
    """Copies of the listening sockets of servers that are to be up.

    While a copy is open the port listens, so a client that connects between the end of a server
    and the start of the next waits for that one instead of being refused. Safe for threads.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._kept: dict[Port, socket.socket] = {}
        self._inodes: frozenset[int] | None = None
        """Of all of them; None: they are other ones since."""

    def __len__(self) -> int:
        return len(self._kept)

    def inodes(self) -> frozenset[int]:
        """What the kernel calls them."""
        with self._mutex:
            if self._inodes is None:
                self._inodes = frozenset(map(sockets.inode, self._kept.values()))
            return self._inodes

    def reserve(self, host: str, port: Port) -> socket.socket:
        """The socket of a port, for a server; the copy stays. Raises PortBusyError, HostError."""
        with self._mutex:
            kept = self._kept.get(port)
            if kept is None:
                self._kept[port] = kept = sockets.reserve(host, port)
                self._inodes = None
            return kept.dup()

    def has(self, port: Port) -> bool:
        """Whether nobody else can listen on a port."""
        return port in self._kept

    def fetch(self, pidfd: int, port: Port) -> None:
        """Keep a copy of the socket of a running server; without the right to, there is none."""
        with self._mutex:
            if port in self._kept:
                return
            found = sockets.fetched(pidfd, port)
            if found:
                self._kept[port] = found
                self._inodes = None

    def drop(self, ports: Iterable[Port]) -> None:
        """Nothing is to listen there any more, unless a server does."""
        with self._mutex:
            for port in ports:
                if kept := self._kept.pop(port, None):
                    kept.close()
                    self._inodes = None

    def keep(self, ports: Collection[Port]) -> None:
        """Drop all others."""
        self.drop([port for port in list(self._kept) if port not in ports])

    def close(self) -> None:
        self.drop(list(self._kept))


class Roster:
    """The servers of one hub that are known to run, each with a pidfd. Safe for threads.

    What is kept of one never changes while it lives: who it is, and its argv.
    """

    def __init__(
        self,
        settings: Settings,
        watch: Callable[[int], None] = lambda _: None,
        unwatch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`watch`: told of a descriptor that is readable when its server has ended."""
        self._hub = settings.hub
        self._watch, self._unwatch = watch, unwatch
        self._mutex = threading.Lock()
        self._known: dict[Identity, tuple[proc.Process, Served, int]] = {}
        self._by_fd: dict[int, Identity] = {}
        self._connections: dict[int, frozenset[int]] = {}
        self._answers: dict[Identity, Handshake] = {}
        self.binary: str | None = None
        """Where qemu-nbd was found since the last whole look."""
        self.foreign: tuple[tuple[proc.Process, Served], ...] = ()
        """The servers that are not ours, as the last whole look saw them."""
        self._foreign_sockets: dict[Identity, frozenset[int]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def ours(self) -> list[tuple[proc.Process, Served]]:
        with self._mutex:
            return [(process, served) for process, served, _ in self._known.values()]

    def note_answers(self, servers: Iterable[Server]) -> None:
        """What servers answered at a look."""
        for server in servers:
            if server.handshake and server.handshake.answered:
                self._answers[server.identity] = server.handshake
            else:
                self._answers.pop(server.identity, None)

    def answers(self, turn: int) -> dict[Identity, Handshake]:
        """What most servers answered last; it is another part's turn to be asked again."""
        return {
            identity: answer
            for identity, answer in list(self._answers.items())
            if identity.pid % TURNS != turn % TURNS and identity in self._known
        }

    def foreign_sockets(self, identity: Identity) -> frozenset[int]:
        """The sockets of a server that is not ours; looked at once between two whole looks."""
        known = self._foreign_sockets
        if identity not in known:
            known[identity] = frozenset(proc.socket_inodes(identity.pid))
        return known[identity]

    def connections(self, pid: int) -> frozenset[int]:
        """The connections of a server that were there at an earlier look."""
        return self._connections.get(pid, frozenset())

    def note_connections(self, pid: int, found: Collection[int]) -> None:
        self._connections[pid] = frozenset(found)

    def of(self, vms: Collection[str]) -> list[tuple[proc.Process, Served]]:
        """Those of some VMs."""
        with self._mutex:
            return [
                (process, served)
                for process, served, _ in self._known.values()
                if served.mark and served.mark.vm in vms
            ]

    def pidfd(self, identity: Identity) -> int | None:
        """The descriptor of one server; it is the roster's own."""
        found = self._known.get(identity)
        return found[2] if found else None

    def ports(self) -> set[Port]:
        """The ports that the marks of running servers name."""
        with self._mutex:
            return {s.mark.port for _, s, _ in self._known.values() if s.mark}

    def look(self) -> set[str]:
        """One pass over all processes; the VMs of servers that were not known, or have gone."""
        self.binary = None  # it may have been installed elsewhere since
        seen: dict[Identity, tuple[proc.Process, Served]] = {}
        foreign = []
        for process in proc.processes():
            served = parse(process.argv)
            if served is None:
                continue
            if served.mark is not None and served.mark.hub == self._hub:
                seen[process.identity] = (process, served)
            else:
                foreign.append((process, served))
        self.foreign, self._foreign_sockets = tuple(foreign), {}
        moved = {vm for identity in self._known.keys() - seen.keys() if (vm := self.end(identity))}
        return moved | {
            vm for process, served in seen.values() if (vm := self._add(process, served))
        }

    def add(self, pid: int) -> None:
        """A server has been started, or has come out of its start."""
        process = proc.process(pid)
        served = parse(process.argv) if process else None
        if process and served and served.mark and served.mark.hub == self._hub:
            self._add(process, served)

    def _add(self, process: proc.Process, served: Served) -> str | None:
        """Its VM, if it was not known as it is now."""
        assert served.mark is not None
        with self._mutex:
            known = self._known.get(process.identity)
            if known:
                if known[1] == served:
                    return None
                self._known[process.identity] = (process, served, known[2])
                return served.mark.vm
            try:
                pidfd = os.pidfd_open(process.identity.pid)
            except ProcessLookupError:
                return None
            if proc.identify(process.identity.pid) != process.identity:
                os.close(pidfd)
                return None
            self._known[process.identity] = (process, served, pidfd)
            self._by_fd[pidfd] = process.identity
        self._watch(pidfd)
        return served.mark.vm

    def ended(self, pidfd: int) -> str | None:
        """The server of a descriptor has ended; its VM. A child is reaped."""
        identity = self._by_fd.get(pidfd)
        return self.end(identity) if identity else None

    def end(self, identity: Identity) -> str | None:
        """A server has ended; its VM. None: it was not known."""
        with self._mutex:
            found = self._known.pop(identity, None)
            if found is None:
                return None
            _, served, pidfd = found
            del self._by_fd[pidfd]
            self._connections.pop(identity.pid, None)
            self._answers.pop(identity, None)
        self._unwatch(pidfd)
        os.close(pidfd)
        processes.reap(identity.pid)
        return served.mark.vm if served.mark else None

    def close(self) -> None:
        for identity in list(self._known):
            self.end(identity)


class Dials:
    """The ssh processes of this hub's tunnels that are known to run, each with a pidfd."""

    def __init__(
        self, hub: str, watch: Callable[[int], None], unwatch: Callable[[int], None]
    ) -> None:
        """`watch`: told of a descriptor that is readable when its ssh has ended."""
        self._hub, self._watch, self._unwatch = hub, watch, unwatch
        self._mutex = threading.Lock()
        self._known: dict[Identity, int] = {}
        self._by_fd: dict[int, tuple[Identity, str]] = {}

    def note(self, lines: Iterable[Ssh]) -> None:
        """What a look saw."""
        for line in lines:
            identity = Identity(line.pid, line.started)
            with self._mutex:
                if identity in self._known:
                    continue
                try:
                    pidfd = os.pidfd_open(line.pid)
                except ProcessLookupError:
                    continue
                if proc.identify(line.pid) != identity:
                    os.close(pidfd)
                    continue
                self._known[identity] = pidfd
                self._by_fd[pidfd] = identity, line.mark.subject
            self._watch(pidfd)

    def ended(self, pidfd: int) -> str | None:
        """The ssh of a descriptor has ended; its tunnel. A child is reaped."""
        with self._mutex:
            found = self._by_fd.pop(pidfd, None)
            if found is None:
                return None
            identity, tunnel = found
            del self._known[identity]
        self._unwatch(pidfd)
        os.close(pidfd)
        processes.reap(identity.pid)
        return tunnel

    def close(self) -> None:
        for pidfd in list(self._by_fd):
            self.ended(pidfd)


class Hands(Hub):
    """Eyes and hands for one apply in a daemon: it looks at what is in scope, and trusts the
    roster for the rest, which the next whole look checks."""

    hears = True

    def __init__(
        self,
        settings: Settings,
        environment: Mapping[str, str],
        store: Store,
        who: str,
        *,
        roster: Roster,
        kept: Sockets,
        reports: Mapping[str, Report] | None,
        reach: Callable[[Collection[str]], Mapping[str, Health]],
        calm: Actual | None = None,
    ) -> None:
        """`reports`: what the SNAs were heard to say; None: they are asked. `reach`: tells whether
        some SNAs are well. `calm`: what was seen lately, when all was well with what is in scope;
        the first look starts from there."""
        super().__init__(settings, environment, store, who)
        self._reach = reach
        self.roster, self.sockets, self.heard = roster, kept, reports
        self.calm = calm
        self.scope: Collection[str] = ()
        self.narrow = False
        """The last look saw nothing but what is in scope."""

    def look(
        self, desired: Desired, ledger: Ledger, *, ask: bool = True, secrets: bool = True
    ) -> Actual:
        self.scope = desired.vms.keys()
        calm, self.calm = self.calm, None
        actual = self._since(calm) if calm else None
        self.narrow = actual is not None
        if actual is None:
            self.kept = self.sockets.inodes()
            actual = super().look(desired, ledger, ask=ask and self.heard is None, secrets=secrets)
        return replace(actual, reports=self.heard) if ask and self.heard is not None else actual

    def _health_of(self, names: Collection[str]) -> Mapping[str, Health]:
        return self._reach(names)

    def _since(self, calm: Actual) -> Actual | None:
        """What is there now, if since a calm look servers of ours have ended, and no more than that
        can matter: their sockets are still ours, so nobody has their ports. None: look at all.

        This is what a heal waits for. The images of the ended are looked at, as what was written
        decides what their end means; all else is looked at when they are up again.
        """
        before = [server for server in calm.servers if server.mark.vm in self.scope]
        known = {server.identity: server for server in before}
        alive: list[Server] = []
        for process, served in self.roster.of(self.scope):
            server = known.get(process.identity)
            if server is None or served.starting:
                return None
            if proc.identify(server.pid) != server.identity:
                return None
            alive.append(server)
        here = {server.identity for server in alive}
        ended = [server for server in before if server.identity not in here]
        if not ended or not all(self.sockets.has(server.mark.port) for server in ended):
            return None
        images = dict(calm.images)
        for server in ended:
            path = server.argv[-1]
            root = roots_of(self.settings, path)[-1]
            try:
                (image,) = patience.ask({root: [partial(look_at, path, root)]})[0].get(root) or ()
            except (HostError, ValueError):
                return None
            images[path] = image
        # Room is for runs that begin; one that does is never at rest.
        return replace(calm, servers=tuple(alive), images=images, file_systems={}, others={})

    def _sorted(
        self,
    ) -> tuple[list[tuple[proc.Process, Served]], list[tuple[proc.Process, Served]]]:
        ours = []
        for process, served in self.roster.ours():
            assert served.mark is not None
            if served.mark.vm in self.scope:
                if proc.identify(process.identity.pid) != process.identity:
                    continue  # it has ended: its descriptor says so too, soon
                if served.starting:
                    self.roster.add(process.identity.pid)
                    process = proc.process(process.identity.pid) or process
                    served = parse(process.argv) or served
            ours.append((process, served))
        return ours, list(self.roster.foreign)

    def _sockets_of(self, process: proc.Process) -> Collection[int]:
        return self.roster.foreign_sockets(process.identity)

    def _server(
        self,
        process: proc.Process,
        served: Served,
        listening: Mapping[Port, set[int]],
        clients: Mapping[Port, int],
    ) -> Server:
        assert served.mark is not None
        if served.mark.vm in self.scope:
            if len(self.scope) <= FEW:
                clients = {served.mark.port: self._clients_of(process.identity.pid)}
            return super()._server(process, served, listening, clients)
        return Server(
            identity=process.identity,
            argv=served.argv,
            mark=served.mark,
            starting=served.starting,
            clients=clients.get(served.mark.port, 0),
        )

    def _settled(self) -> list[proc.Socket]:
        """The sockets that matter here. Connections are counted where the servers hold them, which
        does not make the kernel walk through every connection of the machine."""
        if len(self.scope) > FEW:
            return super()._settled()
        return proc.tcp_sockets(established=False)

    def _clients_of(self, pid: int) -> int:
        """How many clients a server has, without those that come and go."""
        found = proc.socket_inodes(pid) - {proc.listener_inode(pid)}
        if found - self.roster.connections(pid):
            time.sleep(PROBE)
            found &= proc.socket_inodes(pid)
        self.roster.note_connections(pid, found)
        return len(found)

    def reserve(self, port: Port) -> socket.socket:
        try:
            return self.sockets.reserve(self.settings.bind, port)
        except sockets.PortBusyError:
            self.unbindable.add(port)
            raise

    def start(self, export: Export, lease: Lease, listener: sockets.Bound) -> None:
        self._binary = self._binary or self.roster.binary
        super().start(export, lease, listener)
        self.roster.binary = self._binary
        for identity, port in list(self.started.items()):
            if port == lease.port:
                self.roster.add(identity.pid)
